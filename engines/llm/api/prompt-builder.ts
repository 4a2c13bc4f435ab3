import type { Context } from '@opentelemetry/api'
import type { FeatureCache } from '../../cache/feature-cache.ts'
import type { VisionRunner } from '../../encoder/vision.ts'
import { EngineError } from '../../service/errors.ts'
import { featureBlocksFor, type LoadedModel } from '../../models/family.ts'
import type { ChatTemplate } from '../text/chat-template.ts'
import type { LlmEngine } from '../engine.ts'
import type { Tokenizer } from '../text/tokenizer.ts'
import { readPrompts } from './completion-prompts.ts'
import { encodeText } from '../text/encode-text.ts'
import { layOutPrompt, migratedPrompt, type Prompt, type PromptMedia } from './prompt.ts'
import type { ParsedRequest } from './request.ts'

export interface PromptBuilderParts {
  readonly model: LoadedModel
  readonly tokenizer: Tokenizer
  readonly template: ChatTemplate
  readonly vision: VisionRunner | undefined
  readonly features: FeatureCache
  readonly engine: Pick<LlmEngine, 'maxLength'>
  /** Pulled features only pass through the pool, one item at a time. */
  readonly staging: boolean
}

export interface BuildCall {
  readonly signal: AbortSignal
  readonly context: Context
  readonly tenant: string | undefined
}

type ChatInput = Extract<ParsedRequest['input'], { kind: 'chat' }>

/** From a checked request to prompts: template, tokens, media. Features this engine encodes come with one reference each. */
export class PromptBuilder {
  readonly #parts: PromptBuilderParts

  constructor (parts: PromptBuilderParts) {
    this.#parts = parts
  }

  async build (request: ParsedRequest, call: BuildCall): Promise<Prompt[]> {
    const { model, tokenizer, engine } = this.#parts
    const { input } = request
    if (input.kind === 'chat') return [await this.#chat(input, call)]
    if (input.kind === 'migrated') return [migratedPrompt(input.migration, engine.maxLength)]
    return readPrompts(input.body, model.text.vocab, text => encodeText(tokenizer, text, engine.maxLength, 'prompt')).map(ids => layOutPrompt(ids, [], model, engine.maxLength, 'prompt'))
  }

  async #chat (input: ChatInput, call: BuildCall): Promise<Prompt> {
    const { model, tokenizer, template, features, engine } = this.#parts
    // What is wrong with the text shows before any picture is fetched.
    const tokens = encodeText(tokenizer, template.render(input.messages, input.kwargs), engine.maxLength, 'messages')
    const media = await this.#media(input, call)
    try {
      call.signal.throwIfAborted()
      return layOutPrompt(tokens, media, model, engine.maxLength, 'messages')
    } catch (err) {
      for (const { entry } of media) if (entry !== undefined) features.unref(entry)
      throw err
    }
  }

  async #media ({ items, results }: ChatInput, call: BuildCall): Promise<PromptMedia[]> {
    if (items.length === 0) return []
    if (results.length > 0) {
      const media = results.map(source => ({ contentHash: source.contentHash, numTokens: source.numTokens, grid: source.grid, source }))
      this.#checkRoom(media)
      return media
    }
    const { vision } = this.#parts
    if (vision === undefined) {
      throw new EngineError('unsupported', 'this engine has no vision encoder: it takes pictures only as encoder results', { param: items[0]?.param })
    }
    const encoded = await vision.encode({ items, ...call })
    return encoded.map(({ hash, numTokens, grid, entry }) => ({ contentHash: hash, numTokens, grid, entry }))
  }

  /** What can never fit must not wait for it: all features of a request lie in the pool at once, or one item's where they only pass through. */
  #checkRoom (media: readonly PromptMedia[]): void {
    const distinct = new Map(media.map(item => [item.contentHash, featureBlocksFor(item.numTokens)]))
    const { features: { pool: { total } }, staging } = this.#parts
    const needed = [...distinct.values()].reduce((sum, blocks) => staging ? Math.max(sum, blocks) : sum + blocks, 0)
    if (needed > total) {
      throw new EngineError('invalid_request', `the media take ${needed} feature blocks, this engine has ${total}`, { param: 'encoder_result' })
    }
  }
}
