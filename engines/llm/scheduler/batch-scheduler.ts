/** What the two schedulers, of paged blocks and of slots, have in common. */
import type { BlockStats } from '../blocks/block-manager.ts'
import type { PrefillChunk, Sequence } from '../sequence/sequence.ts'

/**
 * The work of the next step. Prefill fills KV blocks and samples nothing; every token is sampled by a decode step. `join`
 * is no forward pass: migrated sequences enter the batch with the token that the prefill engine sampled.
 */
export type Batch =
  | { readonly kind: 'prefill', readonly chunks: readonly PrefillChunk[] }
  | { readonly kind: 'decode', readonly sequences: readonly Sequence[] }
  | { readonly kind: 'join', readonly sequences: readonly Sequence[] }

export interface KvStats extends BlockStats {
  /** Blocks of evicted sequences in host memory, if the scheduler spills. */
  readonly spilled?: number
}

/** Decides what the next step computes, and where keys and values lie. */
export interface BatchScheduler {
  /** The longest sequence (prompt and output) that can run. */
  readonly maxTokens: number
  /** Times a sequence lost its keys and values to another one. */
  readonly evictions: number
  readonly stats: KvStats
  /** All its sequences, running or waiting. */
  readonly size: number
  /** Takes a sequence that is WAITING or, where there are migrations of keys and values, MIGRATION_DONE. */
  add (sequence: Sequence): void
  /** Removes a sequence that has ended, and frees its blocks or hands them to its `keep`. */
  remove (sequence: Sequence): void
  /** The next step; undefined when there is nothing to do. */
  schedule (): Batch | undefined
  /** A chunk has been computed and written. */
  prefilled (chunk: PrefillChunk): void
  /** A decode step computed the last token and sampled the next. */
  decoded (sequence: Sequence, token: number): void
  /** Empties the prefix cache; referenced blocks stay. */
  clear (): void
  /** Throws unless every block is accounted for. */
  checkIntegrity (): void
}

/** How much a batch of prompts may grow by padding them to the longest. */
const MAX_PADDING = 1.25

/** Chunks for one prefill step of at most `budget` tokens: the oldest prompt first, others beside it if padding to the longest costs little. */
export function prefillChunks (oldestFirst: Iterable<Sequence>, budget: number): PrefillChunk[] {
  const chunks: PrefillChunk[] = []
  let left = budget
  let longest = 0
  let real = 0
  for (const sequence of oldestFirst) {
    const count = Math.min(sequence.prefillLeft, left)
    if (count <= 0) continue
    const padded = Math.max(longest, count) * (chunks.length + 1)
    if (chunks.length > 0 && padded > (real + count) * MAX_PADDING) continue
    chunks.push({ sequence, start: sequence.computed, count })
    longest = Math.max(longest, count)
    real += count
    left -= count
  }
  return chunks
}
