import type { Sequence } from '../llm/sequence/sequence.ts'

/** Tokens that stand for rows of a media item; their meaning is its content. */
interface MediaMark {
  readonly start: number
  readonly length: number
  readonly offset: number
  readonly contentHash: string
}

/** What the keys and values in an idle slot were computed from. */
export interface KeptTokens {
  readonly tokens: readonly number[]
  readonly marks: readonly MediaMark[]
  /** Tenants share nothing. */
  readonly cacheSalt: string
}

function marksOf ({ spans, media }: Pick<Sequence, 'spans' | 'media'>): MediaMark[] {
  return spans.map(({ item, start, length, offset }) => ({ start, length, offset, contentHash: media[item]?.contentHash ?? '' }))
}

/** The tokens of a sequence whose keys and values are in its slot. */
export function keptTokens (sequence: Sequence): KeptTokens {
  return { tokens: sequence.tokens.slice(0, sequence.computed), marks: marksOf(sequence), cacheSalt: sequence.cacheSalt }
}

function same (a: MediaMark, b: MediaMark): boolean {
  return a.start === b.start && a.length === b.length && a.offset === b.offset && a.contentHash === b.contentHash
}

/** How many leading tokens of a sequence have the same meaning as those kept, without its last token, which a step has to compute. */
export function commonPrefix (kept: KeptTokens, sequence: Sequence): number {
  if (kept.cacheSalt !== sequence.cacheSalt) return 0
  let end = Math.min(kept.tokens.length, sequence.length - 1)
  const marks = marksOf(sequence)
  for (let i = 0; i < Math.max(marks.length, kept.marks.length); i++) {
    const [a, b] = [kept.marks[i], marks[i]]
    if (a !== undefined && b !== undefined && same(a, b)) continue
    end = Math.min(end, a?.start ?? end, b?.start ?? end)
    break
  }
  for (let at = 0; at < end; at++) if (kept.tokens[at] !== sequence.tokens[at]) return at
  return end
}
