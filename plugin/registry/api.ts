/** What the gateway and the pipeline call the registry with. */
import type { Dispatcher } from 'undici'
import type { Histogram } from '../../adapters/wire/series.ts'
import type { Adapter, CallSignal, Link, Log, NodeInfo, Stage } from '../../adapters/adapter.ts'
import type { NodeOptions } from '../options/schema.ts'
import type { BreakerState, LinkState, LinkView, NodeSnapshot, NodeState, RegistrySnapshot, Verdict } from './types.ts'

/** Where a registration comes from. */
export interface Registrant {
  /** The configuration: a registration over HTTP does not alter the node. */
  readonly configured?: boolean | undefined
  /** IP address of the client that registers the node; the gateway dials it in place of an unspecified host such as 0.0.0.0. */
  readonly peer?: string | undefined
  /** The process that registers ends with the gateway: it is not in `saved`. */
  readonly transient?: boolean | undefined
  /** What has found the node, such as `dns encoder.vlm.svc`: it finds it again after a restart. */
  readonly discovered?: string | undefined
}

/** What a gateway must be given at its next start, beside its configuration. */
export interface SavedNodes {
  readonly nodes: ReadonlyArray<NodeOptions & { readonly peer?: string | undefined }>
  readonly drained: readonly string[]
}

export interface NodeChanges {
  readonly added: readonly string[]
  readonly removed: readonly string[]
  readonly changed: readonly string[]
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
  /** The node has answered well (first good event); closes a half-open breaker before a long stream ends. How the use ends still counts. */
  ok (): void
  /** The node has encoded so many vision tokens in this use until now: a measure of its rate. */
  encoded (tokens: number): void
  /** The use is over. No error: success. What an error says of the node is up to the caller; by default nothing. */
  end (error?: unknown, verdict?: Verdict): void
  /**
   * The connection was cut under this use. Asks the node and resolves with true when it is dead, and this use may be why:
   * it was the last one that the node got. Others had been with the node while it lived.
   *
   * @param known the node has said itself that it goes down
   */
  killed (known: boolean): Promise<boolean>
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
  /** Where the node comes from: `configuration`, `registration`, `embedded`, or what has discovered it. */
  readonly source: string
  readonly adapter: string
  readonly backend: string | null
  readonly epoch: number | null
  /** What it does with media, what it hands on and takes, and which model it is: null and none before its first good probe. */
  readonly vision: NodeInfo['vision'] | null
  readonly produces: readonly string[]
  readonly accepts: readonly string[]
  readonly fingerprint: string | null
  /** Role decode: it also takes requests without a prefill on another node. */
  readonly standalone: boolean
  readonly vision_tokens: number
  /** Vision tokens encoded in a second, as measured lately. */
  readonly vision_rate: number | null
  readonly notes: readonly string[]
  readonly breakers: Readonly<Record<Stage, BreakerState>>
  readonly links: Readonly<Record<string, { readonly state: LinkState, readonly reason?: string, readonly transport?: string }>>
}

export interface RegistryOptions {
  readonly dispatcher: Dispatcher
  readonly log: Log
  /** Of every call of the registry's own, beside the adapter's. */
  readonly headers?: Readonly<Record<string, string>> | undefined
  /** Gets each use of a node that is over, with what its ticket got. */
  readonly stages?: Pick<Histogram, 'record'> | undefined
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
  /** Accepts at once and probes after. Throws TypeError on a URL that is not http(s) or an unknown adapter. */
  add (node: NodeOptions, from?: Registrant): AddResult
  /** Does the node answer a probe from now on, in time? */
  ask (id: string): Promise<boolean>
  /** Seconds until the first breaker of a model's nodes lets a trial through; undefined unless all of them are open at a stage. */
  restOf (model: string): number | undefined
  /** Forgets a node; false when there was none. Only this ever deletes a node. */
  remove (id: string): boolean
  get (id: string): NodeSnapshot | undefined
  /** A drained node gets no further requests; those it has go on. False when there is none. */
  drain (id: string, on: boolean): boolean
  /** Takes these for the configured nodes. Those that registered themselves stay. */
  configure (nodes: readonly NodeOptions[]): NodeChanges
  /** What has changed at run time. */
  saved (): SavedNodes
  /** Where a node comes from. */
  sourceOf (id: string): string | undefined
  /** All nodes, wherever they come from. */
  listed (): SavedNodes
  snapshot (): RegistrySnapshot
  /** Resolves with the first snapshot for which `check` holds; rejects with the signal's reason or when the registry closes. */
  waitFor (check: (snapshot: RegistrySnapshot) => boolean, options?: { signal?: AbortSignal | undefined }): Promise<RegistrySnapshot>
  /**
   * Takes the node into use for a stage. A node that is gone gives a ticket that counts nowhere.
   *
   * @param tokens vision tokens, of a prefill those of the whole prompt
   * @param work tokens of prompt and answer; by default `tokens`
   */
  acquire (id: string, stage: Stage, tokens?: number, work?: number): Ticket
  /**
   * The link over which `to` pulls from `from`: at once when it is there, else it is made (single flight).
   * Throws AdapterError REFUSED or UNAVAILABLE, or the signal's reason.
   */
  ensureLink (from: string, to: string, signal?: CallSignal): Promise<Link>
  /** Counts a planned use as load until it begins, when the caller calls the returned function: otherwise all requests of a moment choose the same node. */
  reserve (id: string, tokens?: number, work?: number): () => void
  /** A link turned out dead (an adapter's error had `unlinked`): it is made again in the background. */
  linkLost (from: string, to: string): void
  /** A use has shown that no node can take what this one produces: its links rest until it restarts. */
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
  /** Ends all timers and probes. Idempotent. */
  close (): Promise<void>
  /** After every change of the snapshot. */
  on (event: 'change', listener: (snapshot: RegistrySnapshot) => void): unknown
  off (event: 'change', listener: (snapshot: RegistrySnapshot) => void): unknown
}
