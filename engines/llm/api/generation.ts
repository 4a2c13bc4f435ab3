import { EngineError } from '../../service/errors.ts'
import type { FeatureCache } from '../../cache/feature-cache.ts'
import type { ChatCall } from '../../service/engine-service.ts'
import type { LlmEngine } from '../engine.ts'
import type { Grammar } from '../grammar/constraint.ts'
import type { Prompt } from '../sequence/prompt.ts'
import type { SequenceInit } from '../sequence/sequence.ts'
import type { Tokenizer } from '../text/tokenizer.ts'
import { ToolCallParser } from '../text/tool-calls.ts'
import type { Tools } from './tools.ts'
import { tenantSalt } from './prepared.ts'
import { Choice, EventQueue, type ChoiceEvent } from './choice.ts'
import type { GenerationParams } from './sampling.ts'

export interface GenerationParts {
  readonly engine: LlmEngine
  readonly features: FeatureCache
  readonly tokenizer: Tokenizer
  /** What the answers may be. */
  readonly grammar?: Grammar | undefined
  /** What the model may call. */
  readonly tools?: Tools | undefined
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
  readonly #queue: EventQueue
  /** Choices whose end has not been read, and choices that have not ended. */
  #left: number
  #live: number
  #first: ChoiceEvent[] | undefined
  readonly #onEnded: () => void

  /**
   * Submits the sequences, which take over the references to features in `prompts`.
   * `onEnded` is called once, when no sequence is live any more.
   */
  constructor (parts: GenerationParts, call: ChatCall, prompts: readonly Prompt[], params: GenerationParams, onEnded: () => void) {
    this.#prompts = prompts
    this.#params = params
    this.#engine = parts.engine
    this.#queue = new EventQueue(() => { parts.engine.wake() })
    this.#left = this.#live = prompts.length * params.n
    this.#onEnded = onEnded
    // Each of the n choices holds a reference; all are taken before the first choice can end.
    for (const { media } of prompts) {
      for (const { features } of media) if (features !== undefined) for (let i = 1; i < params.n; i++) parts.features.ref(features)
    }
    for (const prompt of prompts) for (let i = 0; i < params.n; i++) this.#submit(parts, call, prompt, i)
  }

  #submit ({ engine, tokenizer, grammar, tools, keep }: GenerationParts, call: ChatCall, prompt: Prompt, i: number): void {
    const { sampling, maxTokens, stop, includeStop, skipSpecial } = this.#params
    const calls = tools === undefined ? undefined : new ToolCallParser(new Set(tools.tools.map(tool => tool.name)))
    const choice = new Choice({
      index: this.choices.length, detokenizer: tokenizer.detokenizer(skipSpecial), stop, includeStop, onEvent: event => this.#take(event), isFull: () => this.#queue.full, calls, oneCall: tools?.parallel === false
    })
    this.choices.push(choice)
    const constraint = grammar?.constrain(error => { this.#onMask(choice, error) })
    choice.sequence = engine.submit({
      ...prompt,
      // Each choice holds and releases its own references.
      media: prompt.media.map(item => ({ ...item })),
      id: engine.nextId(),
      requestId: call.requestId,
      cacheSalt: cacheSalt(call, prompt),
      sampling: { ...sampling, seed: (sampling.seed + i) >>> 0 },
      maxTokens: Math.min(maxTokens ?? Infinity, engine.maxLength - prompt.tokens.length),
      keep,
      context: call.context,
      sink: choice,
      constraint
    })
  }

  #onMask ({ sequence }: Choice, error: Error | undefined): void {
    if (error === undefined) return this.#engine.wake()
    if (sequence !== undefined) this.#engine.interrupt(sequence, { kind: 'aborted', error: new EngineError('unsupported', `the answer's form can't be kept: ${error.message}`, { cause: error }) })
  }

  #take (event: ChoiceEvent): void {
    this.#queue.push(event)
    if (event.type === 'end' && --this.#live === 0) this.#onEnded()
  }

  /** Waits for the first token. A failure before that can still become an HTTP status. */
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
    const promptTokens = this.#prompts.reduce((sum, prompt) => sum + prompt.tokens.length, 0)
    const completionTokens = this.choices.reduce((sum, choice) => sum + (choice.sequence?.generated ?? 0), 0)
    // Prefix blocks that the other choices share with the first are no cache hits of the request.
    const firsts = this.choices.filter((_, i) => i % this.#params.n === 0)
    return {
      prompt_tokens: promptTokens,
      completion_tokens: completionTokens,
      total_tokens: promptTokens + completionTokens,
      prompt_tokens_details: {
        cached_tokens: firsts.reduce((sum, choice) => sum + (choice.sequence?.cachedTokens ?? 0), 0),
        image_tokens: this.#prompts.flatMap(prompt => prompt.media).reduce((sum, item) => sum + item.numTokens, 0)
      }
    }
  }
}

/** What prefix caches keep apart: tenants, and engines whose keys and values were taken over. Those are that engine's word, not computed here. */
function cacheSalt ({ tenant }: ChatCall, { migration }: Prompt): string {
  const salt = tenantSalt(tenant)
  return migration === undefined ? salt : `${salt}@${migration.engineId}#${migration.epoch}`
}
