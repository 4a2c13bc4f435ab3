import type { Dispatcher } from 'undici'
import type { Adapter, AdapterNode, ControlRoute, Link, Log, NodeInfo, Role, Stage } from '../../adapters/adapter.ts'

/** `unknown`: not probed yet. Only `healthy` nodes are planned. */
export type NodeState = 'unknown' | 'unhealthy' | NodeInfo['status']

/** `half-open` lets one trial through; while that runs the breaker reads `open`. */
export type BreakerState = 'closed' | 'open' | 'half-open'

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
  /** Vision tokens in flight through this gateway; at a prefill node, estimated prompt tokens. */
  readonly tokens: number
}

/** Live states, one per stage. */
export type Breakers = Readonly<Record<Stage, BreakerState>>

/** One node at one moment. All of it is frozen but `load` and `breakers`, which are live. */
export interface NodeSnapshot {
  readonly id: string
  readonly role: Role
  readonly models: readonly string[]
  readonly state: NodeState
  /** What adapters are called with; carries `info`, `url` and the node's credentials. */
  readonly node: AdapterNode
  /** Provisional until the first good probe of a node that registered without naming one. */
  readonly adapter: Adapter
  readonly info?: NodeInfo | undefined
  /** Relative capacity, from LMDeploy's `speed`; 1 when not told. */
  readonly speed: number
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

/** What `POST /nodes/add` or the configuration says of a node. */
export interface NodeSpec {
  /** Becomes the engine id, byte for byte. */
  readonly url: string
  readonly role?: Role | undefined
  /** Restricts the node to these; else what its probe answers. */
  readonly models?: readonly string[] | undefined
  /** A shipped adapter's name, the name of one given in the options, or an adapter; detected when absent. */
  readonly adapter?: string | Adapter | undefined
  readonly apiKey?: string | undefined
  readonly speed?: number | undefined
  /** What the operator says of its vision, in place of what a probe finds out. */
  readonly vision?: NodeInfo['vision'] | undefined
  /** What the operator says of the longest prompt it takes (role prefill). */
  readonly maxPrefillTokens?: number | undefined
  /** From the configuration: a registration over HTTP does not alter it. */
  readonly configured?: boolean | undefined
  /** IP address of who registered it; dialled in place of an unspecified host such as 0.0.0.0. */
  readonly peer?: string | undefined
}

export interface AddResult {
  readonly id: string
  /** False when the node was there and nothing changed. */
  readonly changed: boolean
  /** Bearer token with which this node may send spans. */
  readonly token: string
}

/** One use of a node; counts as load until `end`. All methods may be called repeatedly, the first call counts. */
export interface Ticket {
  readonly node: string
  readonly stage: Stage
  /** The node has answered well (first good event); closes a half-open breaker before a long stream ends. */
  ok (): void
  /**
   * The use is over. No error: success. UNAVAILABLE counts against the breaker; REJECTED, BUSY and *_GONE show the node
   * alive; anything else (an abort) says nothing.
   */
  end (error?: unknown): void
}

/** LMDeploy's status of a node, with extras its tools ignore. */
export interface NodeStatus {
  readonly role: number
  readonly models: readonly string[]
  readonly unfinished: number
  /** Seconds, the last 15 uses, oldest first. */
  readonly latency: readonly number[]
  readonly speed: number | null
  readonly health: NodeState
  readonly adapter: string
  readonly backend: string | null
  readonly epoch: number | null
  readonly vision_tokens: number
  readonly notes: readonly string[]
  readonly breakers: Readonly<Record<Stage, BreakerState>>
  readonly links: Readonly<Record<string, { readonly state: LinkState, readonly reason?: string }>>
}

export interface RegistryOptions {
  readonly dispatcher: Dispatcher
  readonly log: Log
  /** Told when a use of a node is over, as its ticket was: for metrics. */
  readonly onUse?: ((node: string, stage: Stage, seconds: number, error: unknown) => void) | undefined
  /** Adapters beyond the shipped ones, found by their name; one named like a shipped adapter takes its place. */
  readonly adapters?: readonly Adapter[] | undefined
  /** Milliseconds between probes of a healthy node. Default 5000. */
  readonly probeInterval?: number | undefined
  /**
   * Milliseconds until an unhealthy node is probed again; doubles up to `probeBackoffMax`, with jitter. Default 1000.
   * A node that has just registered starts at an eighth of it, as LMDeploy registers before it listens.
   */
  readonly probeBackoff?: number | undefined
  /** Default 10000. */
  readonly probeBackoffMax?: number | undefined
  /** Milliseconds a probe may take, all its calls together. Default 15000. */
  readonly probeTimeout?: number | undefined
  /** Milliseconds a handshake may take. Default 10000. */
  readonly linkTimeout?: number | undefined
  /** Failures in a row that open a breaker. Default 5. */
  readonly breakerFailures?: number | undefined
  /** Milliseconds a breaker stays open before a trial. Default 10000. */
  readonly breakerCooldown?: number | undefined
}

/** What the plugin and the pipeline use of the registry. */
export interface RegistryApi {
  /** Accepts at once and probes after. Throws TypeError on a URL that is not http(s) or an adapter nobody knows. */
  add (spec: NodeSpec): AddResult
  /** Forgets a node; false when there was none. Only this ever deletes a node. */
  remove (id: string): boolean
  get (id: string): NodeSnapshot | undefined
  snapshot (): RegistrySnapshot
  /** Resolves with the first snapshot for which `check` holds; rejects with the signal's reason or when the registry closes. */
  waitFor (check: (snapshot: RegistrySnapshot) => boolean, options?: { signal?: AbortSignal | undefined }): Promise<RegistrySnapshot>
  /** Takes the node into use for a stage. `tokens`: vision tokens, of a prefill those of the whole prompt. A node that is gone gives a ticket that counts nowhere. */
  acquire (id: string, stage: Stage, tokens?: number): Ticket
  /**
   * The link over which `to` pulls from `from`: at once when it is there, else it is made (single flight).
   * Throws AdapterError REFUSED or UNAVAILABLE, or the signal's reason.
   */
  ensureLink (from: string, to: string, signal?: AbortSignal): Promise<Link>
  /** Counts a use as load that is planned and has not begun, until the function given back is called: else all requests of a moment choose the same node. */
  reserve (id: string, tokens?: number): () => void
  /** A link turned out dead (an adapter's error had `unlinked`): it is made again in the background. */
  linkLost (from: string, to: string): void
  /** What a node produces can be used by nobody, as a use of it has shown: its links rest until it restarts. */
  refuseLinks (from: string, reason: string): void
  /** Makes every link that is missing, refused ones included; resolves when all have an outcome. */
  warmUp (): Promise<readonly LinkView[]>
  /** Probes a node now, out of turn. */
  probe (id: string): void
  tokenFor (id: string): string | undefined
  /** The node a bearer token belongs to, or undefined. */
  isNodeToken (token: string): string | undefined
  /** Body of GET /nodes/status. */
  status (): Record<string, NodeStatus>
  /** Routes the adapters of all known names ask for. */
  controlRoutes (): readonly ControlRoute[]
  /** Ends all timers and probes. Idempotent. */
  close (): Promise<void>
  /** After every change of the snapshot. */
  on (event: 'change', listener: (snapshot: RegistrySnapshot) => void): unknown
  off (event: 'change', listener: (snapshot: RegistrySnapshot) => void): unknown
}
