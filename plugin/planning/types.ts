import type { NodeSnapshot } from '../registry/index.ts'
import type { Bypass, RoutingOptions } from '../options/index.ts'

/** `pd`: text only. `hybrid`: the language model encodes media itself. `p-d` and `e-p-d`: prefill and decode on two nodes. */
export type Topology = 'pd' | 'hybrid' | 'e-pd' | 'p-d' | 'e-p-d'

export type Nodes = readonly NodeSnapshot[]

/** The nodes of one model, by role. */
export interface Pool {
  readonly hybrids: Nodes
  readonly prefills: Nodes
  readonly decodes: Nodes
  readonly encoders: Nodes
}

export interface PlanOptions {
  readonly bypass: Bypass
  readonly routing: RoutingOptions
}

/** The nodes of one request, decided. `order` also says where items go when their encoder fails. */
export interface Plan {
  readonly topology: Topology
  /** For people: response header, span attribute, page. */
  readonly reason: string
  /** P, when prefill and decode run on two nodes; it then pulls the features. */
  readonly prefill?: NodeSnapshot | undefined
  /** PD or D: the node that answers. */
  readonly node: NodeSnapshot
  /** Can P or PD do the encoding when every encoder has failed? */
  readonly fallback: boolean
  /** The language model calls encoders by itself, through this gateway: `order` is empty. */
  readonly callsEncoders: boolean
  /** Encoders for each media item, the first choice first, none for an item that the language model encodes; empty when the topology has no encoder. */
  readonly order: ReadonlyArray<readonly NodeSnapshot[]>
}

export type RefusalCode = 'EPD_ERR_MODEL_NOT_FOUND' | 'EPD_ERR_NO_NODE' | 'EPD_ERR_NO_ENCODER' | 'EPD_ERR_NO_HYBRID' | 'EPD_ERR_CONTEXT_LENGTH'

/** No plan is possible, and why. */
export interface Refusal {
  readonly refused: RefusalCode
  readonly reason: string
  /** The request's member at fault. */
  readonly param?: string | undefined
}
