import type { PoolName } from '../cache/index.ts'
import type { P2PErrorCode, CurveKeys, Dtype, LeaseName, OfferName, ServedPull } from './types.ts'

/** What the main thread and its transfer worker say to each other. */
export interface WorkerPool {
  sab: SharedArrayBuffer
  blockBytes: number
  numBlocks: number
  dtype: Dtype
}

export interface WorkerData {
  engineId: string
  epoch: number
  pools: Partial<Record<PoolName, WorkerPool>>
  /** Address to bind, tcp. */
  tcp: string
  ipc: string | null
  curve: CurveKeys | null
  allowedPeers: string[]
  chunkBytes: number
  window: number
  stallTimeoutMs: number
  heartbeatMs: number
  /** Of `Refusals`. */
  refusals: SharedArrayBuffer
}

export interface LinkTarget {
  engineId: string
  epoch: number
  address: string
  serverKey: string | null
}

export interface PullCall extends LeaseName {
  pool: PoolName
  remoteBlocks: number[]
  localBlocks: number[]
  bytes: number
  gate: SharedArrayBuffer
  traceparent: string | undefined
}

/** `call` is the number under which the answer is awaited. */
export type ToWorker =
  | { op: 'connect', call: number, target: LinkTarget, traceparent: string | undefined }
  | { op: 'drop', engineId: string, code: P2PErrorCode, reason: string }
  | { op: 'pull', call: number, pull: PullCall }
  | { op: 'end', call: number, how: 'ack' | 'release', lease: LeaseName, traceparent: string | undefined }
  | { op: 'offer', engineId: string, lease: string, traceparent: string | undefined }
  | { op: 'ask', call: number, lease: LeaseName }
  | { op: 'cancel', call: number }
  | { op: 'offer-taken' }
  | { op: 'verdict', ask: number, verdict: Verdict }
  | { op: 'close' }

/** The main thread's word on what a peer asks for. */
export type Verdict = { ok: true, ended?: boolean, offer?: object } | { ok: false, code: P2PErrorCode, message: string }

export type FromWorker =
  | { op: 'listening', tcp: string }
  | { op: 'failed-to-start', message: string }
  | { op: 'done', call: number, value: unknown }
  | { op: 'failed', call: number, code: P2PErrorCode, message: string }
  | { op: 'ask-pull', ask: number, from: string, id: string, engine: string, epoch: number, lease: string, pool: PoolName, blocks: number[] }
  | { op: 'ask-end', ask: number, from: string, engine: string, epoch: number, lease: string, how: 'ack' | 'release' }
  | { op: 'ask-offer', ask: number, lease: string }
  | { op: 'offered', offer: OfferName }
  | { op: 'pull-over', ask: number, served: ServedPull | undefined }
  | { op: 'log', level: 'debug' | 'warn', data: object, message: string }
