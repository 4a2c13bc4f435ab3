import type { BlockStats } from './block-manager.ts'
import type { PrefillChunk } from './prefill-chunks.ts'
import type { Sequence } from './sequence.ts'

/** One forward pass. Prefill fills KV blocks and samples nothing; every token is sampled by a decode step. */
export type Plan =
  | { readonly kind: 'prefill', readonly chunks: readonly PrefillChunk[] }
  | { readonly kind: 'decode', readonly sequences: readonly Sequence[] }

/** Who decides what the next forward pass computes, and where keys and values lie. */
export interface BatchScheduler {
  /** The longest sequence (prompt and output) that could ever run. */
  readonly maxTokens: number
  /** Times a sequence lost its keys and values to another one. */
  readonly evictions: number
  readonly stats: BlockStats
  /** Takes a WAITING sequence. */
  add (sequence: Sequence): void
  /** Forgets a sequence that has left WAITING or RUNNING for good, and gives its blocks back. */
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
