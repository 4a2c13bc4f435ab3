import { EngineError } from '../../service/errors.ts'
import type { FeatureEntry } from '../../cache/feature-cache.ts'
import type { LoadedModel, MediaSpan, Positions } from '../../models/family.ts'
import { checkLength } from './migration-request.ts'
import type { EncoderResultEntry, MigrationRequest } from '../sequence/remote.ts'

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
  /** It was prefilled elsewhere. */
  readonly migration?: MigrationRequest
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
    imageTokens: imageTokensOf(media)
  }
}

/** The prompt of a migration request. Nothing of it is computed here: of its positions only the next one counts. */
export function migratedPrompt (migration: MigrationRequest, maxLength: number): Prompt {
  checkLength(migration, maxLength)
  const media = migration.media.map(({ contentHash, numTokens }) => ({ contentHash, numTokens, grid: [] }))
  return {
    ids: migration.tokens,
    positions: { axes: 1, values: new Int32Array(0), next: migration.next },
    spans: migration.spans,
    media,
    imageTokens: imageTokensOf(media),
    migration
  }
}

function imageTokensOf (media: readonly PromptMedia[]): number {
  return media.reduce((sum, item) => sum + item.numTokens, 0)
}
