import { createHash } from 'node:crypto'
import type { Sequence } from '../sequence/sequence.ts'

/**
 * Hash of a full block: the previous block's hash, the token ids in it, and the content hash of each media item in it. Two
 * prompts with the same text around different pictures have the same ids, but different keys and values.
 */
export function blockHash (previous: string, tokens: readonly number[], start: number, end: number, sequence: Pick<Sequence, 'spans' | 'media'>): string {
  const hash = createHash('sha256').update(previous)
  hash.update(Int32Array.from(tokens.slice(start, end)))
  for (const span of sequence.spans) {
    if (span.start >= end) break
    if (span.start + span.length <= start) continue
    const offset = span.offset + Math.max(start - span.start, 0)
    hash.update(`${span.start}:${offset}:${sequence.media[span.item]?.contentHash ?? ''};`)
  }
  return hash.digest('base64')
}

/** Extends `sequence.hashes` to every block that is full below `limit` tokens. */
export function extendHashes (sequence: Sequence, blockTokens: number, limit: number): void {
  const { hashes, tokens } = sequence
  for (let end = (hashes.length + 1) * blockTokens; end <= limit; end += blockTokens) {
    const previous = hashes[hashes.length - 1] ?? sequence.cacheSalt
    hashes.push(blockHash(previous, tokens, end - blockTokens, end, sequence))
  }
}
