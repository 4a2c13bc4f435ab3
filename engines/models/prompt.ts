import { ModelError, type FamilyModel, type MediaSpan, type ModelSource, type PlacedItem, type PromptLayout } from './family.ts'

/** A prompt whose placeholders and media items differ in number. */
export class PlaceholderError extends Error {
  override readonly name = 'PlaceholderError'
}

/**
 * The placeholder with the id `id`, which config.json or else the family's usual token gives, and its text.
 * @throws ModelError when there is none, or tokenizer.json does not know it.
 */
export function readImageToken (source: ModelSource, id: unknown): Pick<FamilyModel, 'imageTokenId' | 'imageToken'> {
  if (typeof id !== 'number') throw new ModelError('config.json: "image_token_id" must be a number')
  const imageToken = Object.entries(source.specialTokens).find(([, known]) => known === id)?.[0]
  if (imageToken === undefined) throw new ModelError(`tokenizer.json: no added token has the id ${id} of config.json's image_token_id`)
  return { imageTokenId: id, imageToken }
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
