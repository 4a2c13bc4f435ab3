import type { BlockPool, LeaseTable, PoolName } from '../cache/index.ts'
import type { WriteGate } from './write-gate.ts'

export type Dtype = 'float32' | 'float16'

export const ELEMENT_BYTES: Readonly<Record<Dtype, number>> = { float32: 4, float16: 2 }

/** What a feature block holds: `block_tokens` rows of `hidden_size` numbers. */
export interface FeatureShape {
  block_tokens: number
  hidden_size: number
  dtype: Dtype
}

/** What a KV block holds: keys and values of `block_tokens` tokens, all layers. */
export interface KvShape {
  block_tokens: number
  layers: number
  kv_heads: number
  head_dim: number
  dtype: Dtype
}

/** A shape as two engines compare it: equal but for `num_blocks`, or they can't exchange blocks. */
export type PoolInfo = (FeatureShape | KvShape) & { block_bytes: number, num_blocks: number }

/** How to reach an engine's transfer socket and whether one's blocks fit it; JSON. Travels as LMDeploy's `endpoint_info`. */
export interface P2PEndpointInfo {
  /** Version of the wire format. */
  v: 1
  engine: string
  epoch: number
  /** Equal on two engines of one host and user. */
  host_id: string
  /** `tcp://host:port` */
  tcp: string
  /** `ipc:///path`, or null where ipc is off. */
  ipc: string | null
  /** The server's CURVE public key (Z85), or null when traffic is neither encrypted nor authenticated. */
  curve: string | null
  /** Of the model: features and KV of one model mean nothing to another. */
  fingerprint: string
  pools: Partial<Record<PoolName, PoolInfo>>
}

export interface P2PPool {
  pool: BlockPool
  shape: FeatureShape | KvShape
}

/** CURVE key pair, Z85 text of 40 characters each, as `curveKeyPair()` of zeromq makes it. */
export interface CurveKeys {
  publicKey: string
  secretKey: string
}

export interface P2PLog {
  debug (data: object, message: string): void
  warn (data: object, message: string): void
  error (data: object, message: string): void
}

/** What the serving side reports about one pull, for metrics and spans. */
export interface ServedPull {
  engine: string
  lease: string
  pool: PoolName
  blocks: number
  bytes: number
  /** Milliseconds from request to the last chunk handed over. */
  ms: number
  outcome: 'done' | 'cancelled' | 'stalled' | 'peer-lost'
  traceparent: string | undefined
}

export interface P2PNodeOptions {
  engineId: string
  /** Random number of this process start. */
  epoch: number
  pools: Partial<Record<PoolName, P2PPool>>
  leases: LeaseTable
  /** Of the model, `LoadedModel.fingerprint`. */
  fingerprint: string
  /** Address to bind. @default '127.0.0.1' */
  host?: string | undefined
  /** TCP port to bind. @default 0: any free one */
  port?: number | undefined
  /** Host others connect to. @default `host`; when that is a wildcard, the host in `engineId`, else this machine's name */
  advertiseHost?: string | undefined
  /** Offer and use ipc between engines of one host. @default true */
  ipc?: boolean | undefined
  /** This engine's keys, as server and as client. Without keys nothing is encrypted and any peer may connect. */
  curve?: CurveKeys | undefined
  /** Public keys of the engines that may connect, or be connected to. @default only `curve.publicKey`: engines share one pair */
  allowedPeers?: readonly string[] | undefined
  /** Bytes of a chunk asked for when pulling, 64 KiB to 8 MiB. */
  chunkBytes?: number | undefined
  /** Chunks of one pull that may be under way at once. */
  window?: number | undefined
  /** A pull we serve ends when its peer takes nothing for so long. @default 10000 */
  stallTimeoutMs?: number | undefined
  /** Heartbeats go out this often; a silent peer counts as dead after five times as long. @default 1000 */
  heartbeatMs?: number | undefined
  log?: P2PLog | undefined
  /** What this engine offers under a lease; asked by the engine that the offer was sent to. @default nothing */
  offers?: { get (lease: string): object | undefined } | undefined
  /** Called when another engine offers blocks. Whoever can reach the socket may send such a message. */
  onOffer?: ((offer: OfferName) => void) | undefined
  /** Called after each pull we served. */
  onServed?: ((pull: ServedPull) => void) | undefined
}

export interface LeaseName {
  /** Engine id of the producer. */
  engineId: string
  epoch: number
  lease: string
}

/** A lease on blocks that another engine is filling. */
export interface OfferName {
  /** The engine that the offer says to be of. */
  engineId: string
  lease: string
  traceparent: string | undefined
}

export interface PullOptions extends LeaseName {
  pool: PoolName
  remoteBlocks: readonly number[]
  /** As many as `remoteBlocks`. They belong to the pull until it has settled, and are never written after that. */
  localBlocks: readonly number[]
  /** Bytes wanted, from the start of the first block. @default all of the blocks */
  bytes?: number | undefined
  signal?: AbortSignal | undefined
  /** W3C trace context of the migration; goes into every header frame. */
  traceparent?: string | undefined
  /** @default 30000 */
  timeoutMs?: number | undefined
  /** Of a caller who wants to know whether the pull has `begun`. */
  gate?: WriteGate | undefined
}

export interface PullResult {
  bytes: number
  transport: Transport
  /** Milliseconds from call to the last verified chunk. */
  ms: number
}

export type Transport = 'ipc' | 'tcp'

/** An established link, as `peer()` returns it. */
export interface P2PPeer {
  engineId: string
  epoch: number
  transport: Transport
  encrypted: boolean
  info: P2PEndpointInfo
}

export interface CallOptions {
  signal?: AbortSignal | undefined
  traceparent?: string | undefined
  timeoutMs?: number | undefined
}

/**
 * NOT_LINKED no link to that engine; STALE the engine restarted since; GONE the lease ended, or the peer is lost;
 * CORRUPT a chunk failed its checksum; INVALID what came whole is no block of this model: another type or shape, or numbers that are not finite; TIMEOUT; REFUSED the peers can't or may not talk; CLOSED this node is closed;
 * ABORTED by the caller's signal.
 */
export type P2PErrorCode = 'NOT_LINKED' | 'STALE' | 'GONE' | 'CORRUPT' | 'INVALID' | 'TIMEOUT' | 'REFUSED' | 'CLOSED' | 'ABORTED'

export class P2PError extends Error {
  override readonly name = 'P2PError'
  readonly code: P2PErrorCode

  constructor (code: P2PErrorCode, message: string, options?: { cause?: unknown }) {
    super(message, options)
    this.code = code
  }
}
