/** The registry at one moment, for the planner and for people. */
import type { Adapter, AdapterNode, Link, NodeInfo, Stage } from '../../adapters/adapter.ts'

/** `unknown`: not probed yet. Only `healthy` nodes are planned. */
export type NodeState = 'unknown' | 'unhealthy' | NodeInfo['status']

/** `half-open` lets one trial through; while that runs the breaker reads `open`. */
export type BreakerState = 'closed' | 'open' | 'half-open'

/** What the end of a use shows of the node. */
export type Verdict = 'alive' | 'failed' | 'unclear'

/** `none`: the pair has nothing to exchange. `failed`: will be tried again. `refused`: not before an end restarts. */
export type LinkState = 'none' | 'linking' | 'linked' | 'failed' | 'refused'

/** A link between two nodes, as `from` (produces) sees it. */
export interface LinkView {
  readonly from: string
  readonly to: string
  readonly state: LinkState
  /** Why it is refused or failed. */
  readonly reason?: string | undefined
  readonly link?: Link | undefined
}

/** Live numbers: reading them twice may give two values. */
export interface NodeLoad {
  /** Requests in flight through this gateway. */
  readonly requests: number
  /** Those of them that have begun; others are planned, and wait for an earlier stage. */
  readonly active?: number | undefined
  /** Vision tokens in flight through this gateway; at a prefill node, estimated prompt tokens. */
  readonly tokens: number
  /** Estimated tokens of the requests in flight, prompts and answers, until their last byte; at an encoder, vision tokens. */
  readonly work: number
  /** Orders nodes by their last use: the higher, the later. 0: never used. */
  readonly usedAt: number
  /** Vision tokens that it encodes in a second, as measured lately; undefined before the first. */
  readonly rate?: number | undefined
  /** Did its last use fail, a moment ago? Uses that show nothing of it do not count. */
  readonly failing?: boolean | undefined
}

/** Live states, one per stage. */
export type Breakers = Readonly<Record<Stage, BreakerState>>

/** One node at one moment: what adapters are called with, and what the planner reads. All of it is frozen but `load` and `breakers`, which are live. */
export interface NodeSnapshot extends AdapterNode {
  readonly models: readonly string[]
  readonly state: NodeState
  /** Provisional until the first good probe of a node that registered without naming one. */
  readonly adapter: Adapter
  /** Relative capacity, from LMDeploy's `speed`; 1 by default. */
  readonly speed: number
  /** The gateway looks at pictures before this node gets them. */
  readonly checkMedia: boolean
  /** An operator has drained it, whatever its state. */
  readonly drained?: boolean | undefined
  /** Why the node is limited or unhealthy, for people. */
  readonly notes: readonly string[]
  readonly load: NodeLoad
  readonly breakers: Breakers
  /** Links by the other node's id, in both directions. Pairs that have nothing to exchange are not in it. */
  readonly links: ReadonlyMap<string, LinkView>
}

/** The registry at one moment; the same object until something changes. */
export interface RegistrySnapshot {
  readonly version: number
  /** In order of registration. */
  readonly nodes: readonly NodeSnapshot[]
  readonly byId: ReadonlyMap<string, NodeSnapshot>
  /** Every model of a healthy node that is not an encoder, once, in order of appearance. */
  readonly models: readonly string[]
  /** State of the link over which `to` pulls from `from`. */
  link (from: string, to: string): LinkState
}
