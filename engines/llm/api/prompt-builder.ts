/** From a checked request to prompts: template, tokens, media. */
import type { Context } from '@opentelemetry/api'
import type { FeatureCache } from '../../cache/feature-cache.ts'
import type { VisionRunner } from '../../encoder/vision.ts'
import { featureBlocksFor, type LoadedModel } from '../../models/family.ts'
import { EngineError } from '../../service/errors.ts'
import type { LlmEngine } from '../engine.ts'
import type { MigrationRequest, Prompt, SequenceMedia } from '../sequence/prompt.ts'
import type { PromptText } from '../text/prompt-text.ts'
import { refuse } from './fields.ts'
import { readPrompts } from './input.ts'
import type { ParsedRequest } from './request.ts'

export interface PromptParts {
  readonly model: LoadedModel
  readonly text: PromptText
  readonly vision: VisionRunner | undefined
  readonly features: FeatureCache
  readonly engine: Pick<LlmEngine, 'maxLength'>
  /** Pulled features only pass through the pool, one item at a time. */
  readonly staging: boolean
}

export interface PromptCall {
  readonly signal: AbortSignal
  readonly context: Context
  readonly tenant: string | undefined
}

type ChatInput = Extract<ParsedRequest['input'], { kind: 'chat' }>

/** The prompts of a request. Media items that this engine encodes come with one reference each to their features. */
export async function buildPrompts ({ input }: ParsedRequest, parts: PromptParts, call: PromptCall): Promise<Prompt[]> {
  const { model, text, engine: { maxLength } } = parts
  if (input.kind === 'chat') return [await chatPrompt(input, parts, call)]
  if (input.kind === 'migrated') return [migratedPrompt(input.migration, maxLength)]
  const prompts: Prompt[] = []
  for (const prompt of readPrompts(input.body, model.text.vocab)) {
    const ids = typeof prompt === 'string' ? await text.encode({ input: prompt, param: 'prompt' }, call.signal) : prompt
    prompts.push(layOutPrompt(ids, [], model, maxLength, 'prompt'))
  }
  return prompts
}

async function chatPrompt (input: ChatInput, parts: PromptParts, call: PromptCall): Promise<Prompt> {
  const { model, text, features, engine: { maxLength } } = parts
  // Errors in the text show before any picture is fetched.
  const { messages, kwargs } = input
  const tokens = await text.encode({ input: { messages, kwargs }, param: 'messages' }, call.signal)
  const media = await mediaOf(input, parts, call)
  try {
    call.signal.throwIfAborted()
    return layOutPrompt(tokens, media, model, maxLength, 'messages')
  } catch (err) {
    for (const item of media) if (item.features !== undefined) features.unref(item.features)
    throw err
  }
}

async function mediaOf ({ items, results }: ChatInput, parts: PromptParts, call: PromptCall): Promise<readonly SequenceMedia[]> {
  if (items.length === 0) return []
  if (results.length > 0) {
    checkRoom(results, parts)
    return results
  }
  const { vision } = parts
  if (vision === undefined) {
    throw new EngineError('unsupported', 'this engine has no vision encoder: it takes pictures only as encoder results', { param: items[0]?.param })
  }
  const encoded = await vision.encode({ items, ...call })
  return encoded.map(({ hash, numTokens, grid, entry }) => ({ contentHash: hash, numTokens, grid, features: entry }))
}

/** Refuses media that can never fit: all features of a request lie in the pool at once, or one item's where they only pass through. */
function checkRoom (media: readonly SequenceMedia[], { features: { pool: { total } }, staging }: PromptParts): void {
  const distinct = new Map(media.map(item => [item.contentHash, featureBlocksFor(item.numTokens)]))
  const needed = [...distinct.values()].reduce((sum, blocks) => staging ? Math.max(sum, blocks) : sum + blocks, 0)
  if (needed > total) refuse('encoder_result', `the media take ${needed} feature blocks, this engine has ${total}`)
}

/**
 * Expands each media placeholder to the item's tokens, and checks that there is room for at least one token of output.
 * @throws EngineError `context_length_exceeded` or `invalid_request`.
 */
function layOutPrompt (text: readonly number[], media: readonly SequenceMedia[], model: LoadedModel, maxLength: number, param: string): Prompt {
  let layout: ReturnType<LoadedModel['layoutPrompt']>
  try {
    layout = model.layoutPrompt(text, media)
  } catch (err) {
    // The placeholder stands in the client's text; which of them stands for a picture would be a guess.
    throw new EngineError('invalid_request', `the text must not contain the model's media placeholder ${model.imageToken}: ${(err as Error).message}`, { param, cause: err })
  }
  const { ids: tokens, mediaSpans: spans } = layout
  if (tokens.length === 0) refuse(param, 'the prompt is empty')
  if (tokens.length >= maxLength) {
    throw new EngineError('context_length_exceeded', `this engine takes ${maxLength} tokens, prompt and output together; the prompt alone has ${tokens.length}`, { param })
  }
  const last = spans.at(-1)
  if (last !== undefined && last.start + last.length === tokens.length) refuse(param, 'the prompt must not end with media')
  return { tokens, positions: model.positions(tokens, spans, media), spans, media }
}

/** The prompt of a migration request. This engine computes nothing of it, so it needs only the next position. */
function migratedPrompt (migration: MigrationRequest, maxLength: number): Prompt {
  const { tokens, next, spans, media } = migration
  if (tokens.length >= maxLength) {
    throw new EngineError('context_length_exceeded', `this engine takes ${maxLength} tokens, prompt and output together; the migrated prompt alone has ${tokens.length}`, { param: 'migration_request.token_ids' })
  }
  return { tokens, positions: { axes: 1, values: new Int32Array(0), next }, spans, media, migration }
}
