import type { NodeSnapshot } from '../registry/index.ts'
import type { Bypass, RoutingOptions } from '../options.ts'

/** `pd`: text only. `hybrid`: the language model encodes by itself. `p-d` and `e-p-d`: prefill and decode apart. */
export type Topology = 'pd' | 'hybrid' | 'e-pd' | 'p-d' | 'e-p-d'

export interface PlanOptions {
  readonly bypass: Bypass
  readonly routing: RoutingOptions
}

/** The nodes of one encode call, decided; `plan.order` says where its items go if it fails. */
export interface Plan {
  readonly topology: Topology
  /** For people: response header, span attribute, page. */
  readonly reason: string
  /** P, when prefill and decode run apart; it is then the one that takes the features. */
  readonly prefill?: NodeSnapshot | undefined
  /** PD or D: the node that answers. */
  readonly node: NodeSnapshot
  /** Can P or PD do the encoding when every encoder has failed? */
  readonly fallback: boolean
  /** Encoders for each media item, the first choice first; empty unless the topology encodes apart. */
  readonly order: ReadonlyArray<readonly NodeSnapshot[]>
}

export type RefusalCode = 'EPD_ERR_MODEL_NOT_FOUND' | 'EPD_ERR_NO_NODE' | 'EPD_ERR_NO_ENCODER' | 'EPD_ERR_NO_HYBRID'

/** No plan is possible, and why. */
export interface Refusal {
  readonly refused: RefusalCode
  readonly reason: string
  /** The member of the request that is at fault. */
  readonly param?: string | undefined
}
