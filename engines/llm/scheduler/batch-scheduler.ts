import type { BlockStats } from '../blocks/block-manager.ts'
import type { Sequence, PrefillChunk } from '../sequence/sequence.ts'

/** What to do next: mostly one forward pass. Prefill fills KV blocks and samples nothing; every token is sampled by a decode step. */
export type Plan =
  | { readonly kind: 'prefill', readonly chunks: readonly PrefillChunk[] }
  | { readonly kind: 'decode', readonly sequences: readonly Sequence[] }
  | JoinPlan

/** No forward pass: these migrated sequences run from now on, and the token they came with is to be told. */
export interface JoinPlan {
  readonly kind: 'join'
  readonly sequences: readonly Sequence[]
}

export interface KvStats extends BlockStats {
  /** Blocks of evicted sequences in host memory, where there is such a way. */
  readonly spilled?: number
}

/** Who decides what the next forward pass computes, and where keys and values lie. */
export interface BatchScheduler {
  /** The longest sequence (prompt and output) that could ever run. */
  readonly maxTokens: number
  /** Times a sequence lost its keys and values to another one. */
  readonly evictions: number
  readonly stats: KvStats
  /** Sequences in it, whatever they wait for. */
  readonly size: number
  /** Takes a sequence that is WAITING or, where there are migrations of keys and values, MIGRATION_DONE. */
  add (sequence: Sequence): void
  /** Forgets a sequence that has ended, and gives its blocks back (or hands them to its `keep`). */
  remove (sequence: Sequence): void
  /** The next forward pass; undefined when there is nothing to do. */
  schedule (): Plan | undefined
  /** A chunk has been computed and written. */
  prefilled (chunk: PrefillChunk): void
  /** A decode step computed the last token and sampled the next. */
  decoded (sequence: Sequence, token: number): void
  /** Forgets every cached prefix that nobody uses. */
  clear (): void
  /** Throws unless every block is accounted for. */
  checkIntegrity (): void
}
