import { EngineError } from '../../service/errors.ts'
import type { FeatureCache } from '../../cache/feature-cache.ts'
import type { ChatCall } from '../../service/engine-service.ts'
import type { LlmEngine } from '../engine.ts'
import type { SequenceInit } from '../sequence/sequence.ts'
import type { Tokenizer } from '../text/tokenizer.ts'
import { Choice, type ChoiceEvent } from './choice.ts'
import { EventQueue } from './event-queue.ts'
import type { Prompt } from './prompt.ts'
import type { GenerationParams } from './sampling.ts'

export interface GenerationParts {
  readonly engine: LlmEngine
  readonly features: FeatureCache
  readonly tokenizer: Tokenizer
  /** Takes over the KV blocks of the only sequence; by default they are freed. */
  readonly keep?: SequenceInit['keep']
}

export interface Usage {
  readonly prompt_tokens: number
  readonly completion_tokens: number
  readonly total_tokens: number
  readonly prompt_tokens_details: { readonly cached_tokens: number, readonly image_tokens: number }
}

/** The choices of one request: every prompt `n` times. Owns their cancellation. */
export class Generation {
  readonly choices: Choice[] = []
  readonly #prompts: readonly Prompt[]
  readonly #params: GenerationParams
  readonly #engine: LlmEngine
  readonly #queue = new EventQueue<ChoiceEvent>()
  /** Choices whose end was not read yet, and choices that have not ended. */
  #left: number
  #live: number
  #first: ChoiceEvent[] | undefined
  readonly #onEnded: () => void

  /**
   * Submits the sequences; the references to features that `prompts` come with are theirs from here on.
   * `onEnded` is called once, when no sequence is live any more.
   */
  constructor (parts: GenerationParts, call: ChatCall, prompts: readonly Prompt[], params: GenerationParams, onEnded: () => void) {
    this.#prompts = prompts
    this.#params = params
    this.#engine = parts.engine
    this.#left = this.#live = prompts.length * params.n
    this.#onEnded = onEnded
    // A sibling needs a reference of its own before the first one can end.
    for (const prompt of prompts) {
      for (const { entry } of prompt.media) if (entry !== undefined) for (let i = 1; i < params.n; i++) parts.features.ref(entry)
    }
    for (const prompt of prompts) for (let i = 0; i < params.n; i++) this.#submit(parts, call, prompt, i)
  }

  #submit ({ engine, tokenizer, keep }: GenerationParts, call: ChatCall, prompt: Prompt, i: number): void {
    const { sampling, maxTokens, stop, includeStop, skipSpecial } = this.#params
    const choice = new Choice({
      index: this.choices.length, detokenizer: tokenizer.detokenizer(skipSpecial), stop, includeStop, onEvent: event => this.#take(event)
    })
    this.choices.push(choice)
    choice.sequence = engine.submit({
      id: engine.nextId(),
      requestId: call.requestId,
      prompt: prompt.ids,
      positions: prompt.positions,
      spans: prompt.spans,
      media: prompt.media.map(({ contentHash, numTokens, source, entry }) => ({ contentHash, numTokens, source, features: entry })),
      cacheSalt: `tenant:${call.tenant ?? ''}`,
      sampling: { ...sampling, seed: (sampling.seed + i) >>> 0 },
      maxTokens: Math.min(maxTokens ?? Infinity, engine.maxLength - prompt.ids.length),
      migration: prompt.migration,
      keep,
      context: call.context,
      sink: choice
    })
  }

  #take (event: ChoiceEvent): void {
    this.#queue.push(event)
    if (event.type === 'end' && --this.#live === 0) this.#onEnded()
  }

  /** Waits until the client may be told that it goes well; what fails before that can still be an HTTP status. */
  async started (): Promise<void> {
    const events = await this.#queue.take()
    for (const event of events) if (event.type === 'end') this.#throwIfFailed(event)
    this.#first = events
  }

  /** Events until every choice has ended. @throws when one of them failed or was cancelled; the others are cancelled then. */
  async * events (): AsyncGenerator<ChoiceEvent[]> {
    try {
      while (this.#left > 0) {
        const events = this.#first ?? await this.#queue.take()
        this.#first = undefined
        for (const event of events) {
          if (event.type !== 'end') continue
          this.#throwIfFailed(event)
          this.#left--
        }
        yield events
      }
    } finally {
      this.cancel(new EngineError('cancelled', 'the request was cancelled'))
    }
  }

  #throwIfFailed ({ outcome }: Extract<ChoiceEvent, { type: 'end' }>): void {
    if (outcome.kind !== 'stopped' && outcome.kind !== 'aborted') return
    this.cancel(outcome.error)
    throw outcome.error
  }

  /** Stops every choice that has not ended. */
  cancel (error: Error): void {
    for (const { sequence, outcome } of this.choices) {
      if (sequence !== undefined && outcome === undefined) this.#engine.interrupt(sequence, { kind: 'stopped', error })
    }
  }

  usage (): Usage {
    const promptTokens = this.#prompts.reduce((sum, prompt) => sum + prompt.ids.length, 0)
    const completionTokens = this.choices.reduce((sum, choice) => sum + (choice.sequence?.generated ?? 0), 0)
    // What siblings share with the first of them is no cache hit of the request.
    const firsts = this.choices.filter((_, i) => i % this.#params.n === 0)
    return {
      prompt_tokens: promptTokens,
      completion_tokens: completionTokens,
      total_tokens: promptTokens + completionTokens,
      prompt_tokens_details: {
        cached_tokens: firsts.reduce((sum, choice) => sum + (choice.sequence?.cachedTokens ?? 0), 0),
        image_tokens: this.#prompts.reduce((sum, prompt) => sum + prompt.imageTokens, 0)
      }
    }
  }
}
