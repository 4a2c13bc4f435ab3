import { createHash } from 'node:crypto'
import { ProgramHost } from '../../runtime/program-host.ts'
import type { EngineLog, RequestLimits } from '../../service/engine-service.ts'
import { EngineError } from '../../service/errors.ts'
import type { ChatTemplate } from './chat-template.ts'
import type { TextJob, TextMethods } from './text-program.ts'
import type { ToolFormat } from './tool-calls.ts'
import { encodeText, type Tokenizer } from './tokenizer.ts'

/** What is rendered and tokenised on the spot, about 10 ms at most; the worker has the rest. */
const SMALL_CHARACTERS = 8192
const SMALL_MESSAGES = 64
/** Requests to come whose tokens are remembered. */
const MAX_PREPARED = 64

type Job = Pick<TextJob, 'input' | 'param'>

export interface PromptTextOptions {
  /** Model folder. */
  readonly dir: string
  readonly tokenizer: Tokenizer
  readonly template: ChatTemplate
  /** Tokens that prompt and output may have together. */
  readonly maxLength: () => number
  readonly log: EngineLog
}

/** From messages or text to tokens. What can't fit the model is refused before it is rendered, and what takes long is done in a worker. */
export class PromptText {
  readonly #options: PromptTextOptions
  #worker: Promise<ProgramHost<TextMethods>> | undefined
  /** Tokens of texts that are to be asked for again, until they are, by a hash of what was given. */
  readonly #prepared = new Map<string, Promise<readonly number[]>>()

  constructor (options: PromptTextOptions) {
    this.#options = options
  }

  get toolFormat (): ToolFormat {
    return this.#options.template.toolFormat
  }

  /** Each message has a role, and no token has more characters than the longest. */
  get limits (): RequestLimits {
    const tokens = this.#options.maxLength()
    return { tokens, messages: tokens, characters: tokens * this.#options.tokenizer.longest }
  }

  /** As `encode`, and remembers the tokens: the request is still to come. */
  async prepare (job: Job, signal: AbortSignal): Promise<readonly number[]> {
    const key = hashOf(job)
    const tokens = this.#encode(job, signal)
    tokens.catch(() => { this.#prepared.delete(key) })
    this.#prepared.set(key, tokens)
    if (this.#prepared.size > MAX_PREPARED) this.#prepared.delete(this.#prepared.keys().next().value!)
    return await tokens
  }

  /** @throws EngineError `context_length_exceeded`, or what the template throws */
  async encode (job: Job, signal: AbortSignal): Promise<readonly number[]> {
    if (this.#prepared.size === 0) return await this.#encode(job, signal)
    const key = hashOf(job)
    const tokens = this.#prepared.get(key)
    this.#prepared.delete(key)
    // What was told fails by itself when its caller leaves; this one is still there.
    return await (tokens?.catch(() => this.#encode(job, signal)) ?? this.#encode(job, signal))
  }

  async #encode (job: Job, signal: AbortSignal): Promise<readonly number[]> {
    const { tokenizer, template } = this.#options
    const { limits } = this
    const maxLength = limits.tokens
    const { characters, messages } = sizeOf(job.input)
    if (messages > limits.messages || characters > limits.characters) {
      throw new EngineError('context_length_exceeded', `this engine takes ${maxLength} tokens, prompt and output together; ${messages > limits.messages ? `${messages} messages and parts` : `${characters} characters`} are more`, { param: job.param })
    }
    if (characters <= SMALL_CHARACTERS && messages <= SMALL_MESSAGES) {
      const { input } = job
      return encodeText(tokenizer, typeof input === 'string' ? input : template.render(input.messages, input.kwargs), maxLength, job.param)
    }
    // An engine that is closing starts no worker.
    signal.throwIfAborted()
    const { value } = await (await this.#open()).call('encode', { ...job, maxLength }, { signal })
    if ('tokens' in value) return Array.from(value.tokens)
    const { code, message, param } = value.error
    throw new EngineError(code, message, { param })
  }

  /** Started by the first long prompt: it loads the tokenizer once more. */
  #open (): Promise<ProgramHost<TextMethods>> {
    const { dir, log } = this.#options
    this.#worker ??= ProgramHost.open<TextMethods, string>({ program: new URL('./text-program.js', import.meta.url), device: 'cpu', threads: 1, data: dir, name: 'text', log })
    this.#worker.catch(() => { this.#worker = undefined })
    return this.#worker
  }

  async close (): Promise<void> {
    await (await this.#worker?.catch(() => undefined))?.close()
  }
}

function hashOf (job: Job): string {
  return createHash('sha256').update(JSON.stringify(job)).digest('base64')
}

/** More values than a few switches. */
function hasMany (kwargs: Readonly<Record<string, unknown>>): boolean {
  const left: unknown[] = [kwargs]
  for (let count = 0; left.length > 0; count++) {
    if (count > SMALL_MESSAGES) return true
    const value = left.pop()
    if (typeof value === 'string' && value.length > SMALL_CHARACTERS) return true
    if (typeof value === 'object' && value !== null) for (const member of Object.values(value)) if (left.push(member) > SMALL_MESSAGES) return true
  }
  return false
}

function sizeOf (input: Job['input']): { characters: number, messages: number } {
  if (typeof input === 'string') return { characters: input.length, messages: 0 }
  let [characters, messages] = [0, 0]
  // What a template makes of its arguments is unknown: many of them make a long prompt.
  if (hasMany(input.kwargs)) characters += SMALL_CHARACTERS
  for (const { content, tool_calls: calls } of input.messages) {
    messages++
    // Each has a name and arguments.
    if (calls !== undefined) messages += calls.length
    if (typeof content === 'string') characters += content.length
    else {
      messages += content.length
      for (const part of content) if (part.type === 'text') characters += part.text.length
    }
  }
  return { characters, messages }
}
