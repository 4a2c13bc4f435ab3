import { EngineError } from '../../errors.ts'
import type { FeatureEntry } from '../../cache/feature-cache.ts'
import type { LoadedModel, MediaSpan, Positions } from '../../models/family.ts'
import type { EncoderResultEntry } from '../encoder-result.ts'

/** One media item of a prompt, whichever way its features come. */
export interface PromptMedia {
  readonly contentHash: string
  readonly numTokens: number
  readonly grid: readonly number[]
  /** Features still to be pulled ... */
  readonly source?: EncoderResultEntry
  /** ... or here, encoded by this engine. */
  readonly entry?: FeatureEntry
}

/** A prompt as the engine runs it. */
export interface Prompt {
  readonly ids: readonly number[]
  readonly positions: Positions
  readonly spans: readonly MediaSpan[]
  readonly media: readonly PromptMedia[]
  /** For usage: tokens that stand for media. */
  readonly imageTokens: number
}

/**
 * Lays tokens out around media and checks that the model has room for them and at least one token of output.
 * @throws EngineError `context_length_exceeded` or `invalid_request`.
 */
export function layOutPrompt (tokens: readonly number[], media: readonly PromptMedia[], model: LoadedModel, maxLength: number, param: string): Prompt {
  let layout: ReturnType<LoadedModel['layoutPrompt']>
  try {
    layout = model.layoutPrompt(tokens, media)
  } catch (err) {
    // Somebody wrote the placeholder out in text; guessing which of them stands for a picture would be worse than refusing.
    throw new EngineError('invalid_request', `the text must not contain the model's media placeholder ${model.imageToken}: ${(err as Error).message}`, { param, cause: err })
  }
  const { ids, mediaSpans } = layout
  if (ids.length === 0) throw new EngineError('invalid_request', 'the prompt is empty', { param })
  if (ids.length >= maxLength) {
    throw new EngineError('context_length_exceeded', `this engine takes ${maxLength} tokens, prompt and output together; the prompt alone has ${ids.length}`, { param })
  }
  const last = mediaSpans.at(-1)
  if (last !== undefined && last.start + last.length === ids.length) throw new EngineError('invalid_request', 'the prompt must not end with media', { param })
  return {
    ids,
    positions: model.positions(ids, mediaSpans, media),
    spans: mediaSpans,
    media,
    imageTokens: media.reduce((sum, item) => sum + item.numTokens, 0)
  }
}
