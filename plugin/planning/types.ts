import type { MediaItem } from '../../adapters/adapter.ts'
import type { NodeSnapshot } from '../registry/index.ts'
import type { Bypass, RoutingOptions } from '../options.ts'

/** `pd`: text only. `hybrid`: the language model encodes by itself. `p-d` and `e-p-d` are for prefill and decode apart. */
export type Topology = 'pd' | 'hybrid' | 'e-pd' | 'p-d' | 'e-p-d'

/** All the planner knows of a request. */
export interface RequestView {
  readonly model: string
  readonly media: readonly MediaItem[]
  /** A route whose media parts nobody scans (`/v1/responses`, ...): prefer nodes that could take some. */
  readonly opaque?: boolean
}

export interface PlanOptions {
  readonly bypass: Bypass
  readonly routing: RoutingOptions
}

/** The nodes of one encode call, decided; `plan.order` says where its items go if it fails. */
export interface Plan {
  readonly topology: Topology
  /** For people: response header, span attribute, page. */
  readonly reason: string
  /** PD: the node that generates. */
  readonly node: NodeSnapshot
  /** Can `node` do the encoding when every encoder has failed? */
  readonly fallback: boolean
  /** Encoders for each media item, the first choice first; empty unless the topology encodes apart. */
  readonly order: ReadonlyArray<readonly NodeSnapshot[]>
}

export type RefusalCode = 'EPD_ERR_MODEL_NOT_FOUND' | 'EPD_ERR_NO_NODE' | 'EPD_ERR_NO_ENCODER'

/** No plan is possible, and why. */
export interface Refusal {
  readonly refused: RefusalCode
  readonly reason: string
}
