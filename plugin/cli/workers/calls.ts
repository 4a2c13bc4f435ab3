/** What the primary and its workers say to each other. */
import type { Stage } from '../../../adapters/adapter.ts'
import type { KeyOptions, EpdOptions } from '../../options/index.ts'
import type { Kind, Rate } from '../../http/keys/rates.ts'
import type { Stats } from '../../pipeline/stats.ts'
import type { Work } from '../../pipeline/admission.ts'
import type { SavedNodes, Verdict } from '../../registry/index.ts'
import type { GatewayMetrics } from '../../telemetry/metrics.ts'
import type { StoredSpan } from '../../traces/span.ts'
import type { PartCall } from './part-calls.ts'

/** What a worker begins with. */
export interface Birth {
  /** As the configuration and the flags say. */
  readonly options: EpdOptions
  readonly shares: Shares
  readonly nodes: SavedNodes
  readonly logLevel: string
  /** Where the primary answers what operators ask. */
  readonly socket: string
  /** Where the worker answers others. */
  readonly own: string
}

/** What all workers must have in common. */
export interface Shares {
  readonly workers: number
  readonly vllmSecret: string
  /** Without a choice it depends on the embedded engines, which only the primary has. */
  readonly bypass: 'auto' | 'never'
}

/** What has happened at a worker, in the order in which it did. */
export type Event =
  | readonly ['use', use: number, node: string, stage: Stage, tokens: number, work: number]
  | readonly ['ok', use: number]
  | readonly ['encoded', use: number, tokens: number]
  | readonly ['end', use: number, failed: boolean, verdict: Verdict | undefined]
  | readonly ['span', StoredSpan]
  | readonly ['inFlight', number]
  | readonly ['counted', counter: CounterName, amount: number, labels: ReadonlyArray<string | null>]
  | readonly ['measured', histogram: HistogramName, value: number, labels: ReadonlyArray<string | null>, traceId: string | null]
  | readonly ['items', node: string, items: number, cached: number]
  | readonly ['moved', encodeMoves: number, encodeFallbacks: number]

/** What workers count and measure; admission and its waits are the primary's. */
export const COUNTERS = ['served', 'retried', 'requestBytes', 'answerBytes', 'skipped', 'keyRequests', 'keyTokens'] as const satisfies ReadonlyArray<keyof Stats>
export const HISTOGRAMS = ['durations', 'firstChunks', 'firstTokens', 'perTokens', 'tokens', 'stages'] as const satisfies ReadonlyArray<keyof GatewayMetrics>

export type CounterName = typeof COUNTERS[number]
export type HistogramName = typeof HISTOGRAMS[number]

export interface ToPrimary {
  birth (none: null): Birth
  /** It takes requests. */
  listening (url: string): void
  failed (reason: string): void
  /** The socket of the worker that has this request of a language server. */
  ownerOf (call: PartCall): Promise<string>
  happened (events: readonly Event[]): void
  /** Waits for admission. */
  enter (entry: { readonly id: number, readonly work: Work }): Promise<{ readonly admitted: boolean, readonly retryAfter?: number | undefined }>
  leaveEncoders (id: number): void
  /** Let in or still waiting: it goes. */
  leave (id: number): void
  takeRate (take: { readonly key: KeyOptions, readonly kind: Kind, readonly amount: number }): Promise<{ readonly rate?: Rate | undefined, readonly away?: string }>
  /** One more request of a named key, if it may have so many at once. */
  beginWithKey (key: { readonly name: string, readonly concurrency?: number | undefined }): boolean
  endWithKey (name: string): void
}

export interface ToWorker {
  nodes (nodes: SavedNodes): void
  /** Has it this request of a language server? */
  has (call: PartCall): boolean | Promise<boolean>
  /** The configuration was read again. */
  reload (options: EpdOptions): void
  /** Tells all that has happened until now. */
  flush (none: null): void
  picture (place: { readonly trace: string, readonly index: number }): Promise<{ readonly type: string, readonly base64: string } | null>
  close (none: null): void
}
