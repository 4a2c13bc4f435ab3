import type { PrefillChunk, Sequence } from '../sequence/sequence.ts'

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
