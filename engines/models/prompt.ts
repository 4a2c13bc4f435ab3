import type { MediaSpan, PlacedItem, PromptLayout } from './family.ts'

/** A prompt whose placeholders and media items differ in number. */
export class PlaceholderError extends Error {
  override readonly name = 'PlaceholderError'
}

/**
 * Replaces each placeholder by the item's tokens in one run, between a start and an end marker where the model has them
 * and the chat template has not already put them there.
 * @throws PlaceholderError when placeholders and items differ in number.
 */
export function expandContiguous (
  ids: readonly number[], items: readonly PlacedItem[], placeholder: number, markers: { start: number | undefined, end: number | undefined }
): PromptLayout {
  const found = ids.reduce((n, id) => n + (id === placeholder ? 1 : 0), 0)
  if (found !== items.length) throw new PlaceholderError(`the prompt has places for ${found} media items, ${items.length} were given`)
  const out: number[] = []
  const mediaSpans: MediaSpan[] = []
  for (const [at, id] of ids.entries()) {
    const item = items[mediaSpans.length]
    if (id !== placeholder || item === undefined) {
      out.push(id)
      continue
    }
    if (markers.start !== undefined && ids[at - 1] !== markers.start) out.push(markers.start)
    mediaSpans.push({ item: mediaSpans.length, start: out.length, length: item.numTokens, offset: 0 })
    for (let i = 0; i < item.numTokens; i++) out.push(placeholder)
    if (markers.end !== undefined && ids[at + 1] !== markers.end) out.push(markers.end)
  }
  return { ids: out, mediaSpans }
}
