import { StringDecoder } from 'node:string_decoder'
import { request, type Dispatcher } from 'undici'

export interface ExchangeOptions {
  /** Of the chat completions. */
  readonly url: string
  readonly headers: Readonly<Record<string, string>>
  readonly dispatcher: Dispatcher
  readonly timeoutMs: number
  /** The load is given up. */
  readonly signal: AbortSignal
}

export interface Failure {
  /** Of the answer; null where none came. */
  readonly status: number | null
  readonly code: string
  readonly message: string
}

/** One request and its answer. Times are on the clock of `performance.now()`, in milliseconds. */
export interface Exchange {
  readonly endedAt: number
  readonly failure: Failure | undefined
  /** Undefined where no token came. */
  readonly firstAt: number | undefined
  readonly lastAt: number | undefined
  readonly inputTokens: number | undefined
  readonly outputTokens: number
  /** What counted the output tokens. */
  readonly counted: 'usage' | 'chunks'
  /** The header `x-epd-plan` of this project's gateway. */
  readonly plan: string | undefined
}

interface Delta { readonly content?: unknown, readonly reasoning_content?: unknown, readonly reasoning?: unknown, readonly tool_calls?: unknown }
interface Event {
  readonly error?: unknown
  readonly usage?: { readonly prompt_tokens?: unknown, readonly completion_tokens?: unknown } | null
  readonly choices?: ReadonlyArray<{ readonly delta?: Delta, readonly text?: unknown, readonly finish_reason?: unknown }>
}

const MESSAGE_LENGTH = 300
const NAME_LENGTH = 60
/** No token needs that much: the server sends something else. */
const EVENT_LENGTH = 4 * 1_048_576
/** An answer that is no stream is read so far. */
const ANSWER_LENGTH = 64 * 1024

/** Sends a body and reads its stream. Undefined when the signal ended it. */
export async function exchange (body: Buffer, { url, headers, dispatcher, timeoutMs, signal }: ExchangeOptions): Promise<Exchange | undefined> {
  const reading = new Reading()
  let plan: string | undefined
  const end = (failure?: Failure): Exchange => ({ ...reading.figures(), endedAt: performance.now(), failure, plan })
  // A timer of its own in place of AbortSignal.any, which on Node 20 keeps each signal for as long as the load runs.
  const ending = new AbortController()
  const onAbort = (): void => { ending.abort(signal.reason) }
  const timer = setTimeout(() => { ending.abort(new TimeoutError()) }, timeoutMs)
  signal.addEventListener('abort', onAbort, { once: true })
  let status: number | null = null
  try {
    const answer = await request(url, { method: 'POST', headers: { 'content-type': 'application/json', ...headers }, body, dispatcher, signal: ending.signal })
    // What is left of an answer that is not read to its end is of no interest.
    answer.body.on('error', () => {})
    status = answer.statusCode
    plan = textOf(answer.headers['x-epd-plan'])?.slice(0, NAME_LENGTH)
    const type = textOf(answer.headers['content-type']) ?? ''
    if (status !== 200) return end(failureOf(status, await beginningOf(answer.body)))
    if (!type.startsWith('text/event-stream')) {
      answer.body.destroy()
      return end({ status, code: 'no_stream', message: `the server answered ${type === '' ? 'without content-type' : type} in place of an event stream` })
    }
    for await (const chunk of answer.body) reading.take(chunk as Buffer, performance.now())
    return end(reading.failure(status))
  } catch (err) {
    if (signal.aborted) return undefined
    if (ending.signal.aborted) return end({ status, code: 'timeout', message: `no end of the answer within ${timeoutMs / 1_000} s` })
    const { code, message } = err as NodeJS.ErrnoException
    return end({ status, code: code ?? 'failed', message: message === '' ? String(code) : message })
  } finally {
    clearTimeout(timer)
    signal.removeEventListener('abort', onAbort)
  }
}

class TimeoutError extends Error {}

/** What an event stream has said so far. */
class Reading {
  readonly #decoder = new StringDecoder('utf8')
  #rest = ''
  #firstAt: number | undefined
  #lastAt: number | undefined
  #chunks = 0
  #input: number | undefined
  #output: number | undefined
  #whole = false
  #error: unknown

  take (chunk: Buffer, at: number): void {
    const lines = (this.#rest + this.#decoder.write(chunk)).split('\n')
    this.#rest = lines.pop()!
    if (this.#rest.length > EVENT_LENGTH) throw Object.assign(new Error(`an event has more than ${EVENT_LENGTH / 1_048_576} MiB`), { code: 'event_too_long' })
    for (const line of lines) this.#line(line.trimEnd(), at)
  }

  figures (): Pick<Exchange, 'firstAt' | 'lastAt' | 'inputTokens' | 'outputTokens' | 'counted'> {
    return { firstAt: this.#firstAt, lastAt: this.#lastAt, inputTokens: this.#input, outputTokens: this.#output ?? this.#chunks, counted: this.#output === undefined ? 'chunks' : 'usage' }
  }

  /** Why the answer, which is over, is none. */
  failure (status: number): Failure | undefined {
    if (this.#rest !== '') this.take(Buffer.from('\n'), performance.now())
    if (this.#error !== undefined) return { status, ...reasonOf(this.#error) }
    return this.#whole ? undefined : { status, code: 'incomplete', message: 'the stream ended before its answer did' }
  }

  #line (line: string, at: number): void {
    if (!line.startsWith('data:')) return
    const data = line.slice(5).trim()
    if (data === '[DONE]') {
      this.#whole = true
      return
    }
    const event = parse(data)
    if (event === undefined) {
      this.#error ??= { code: 'no_json', message: `an event is no JSON: ${data.slice(0, MESSAGE_LENGTH)}` }
      return
    }
    if (event.error !== undefined && event.error !== null) this.#error ??= event.error
    this.#input = countOf(event.usage?.prompt_tokens) ?? this.#input
    this.#output = countOf(event.usage?.completion_tokens) ?? this.#output
    const choices = Array.isArray(event.choices) ? event.choices : []
    if (choices.some(choice => typeof choice?.finish_reason === 'string')) this.#whole = true
    if (!choices.some(choice => says(choice?.delta) || isText(choice?.text))) return
    this.#chunks++
    this.#firstAt ??= at
    this.#lastAt = at
  }
}

/** A first event with the role alone is no token. */
function says (delta: Delta | undefined): boolean {
  return isText(delta?.content) || isText(delta?.reasoning_content) || isText(delta?.reasoning) || (Array.isArray(delta?.tool_calls) && delta.tool_calls.length > 0)
}

function isText (value: unknown): boolean {
  return typeof value === 'string' && value !== ''
}

function countOf (value: unknown): number | undefined {
  return typeof value === 'number' && Number.isSafeInteger(value) && value >= 0 ? value : undefined
}

function parse (text: string): Event | undefined {
  try {
    const value: unknown = JSON.parse(text)
    return typeof value === 'object' && value !== null ? value : undefined
  } catch {
    return undefined
  }
}

/** Errors as OpenAI, FastAPI and LMDeploy write them, or whatever text came. */
function failureOf (status: number, text: string): Failure {
  const value = parse(text) as { error?: unknown, detail?: unknown } | undefined
  return { status, ...reasonOf(value?.error ?? value?.detail ?? value ?? text) }
}

function reasonOf (error: unknown): { code: string, message: string } {
  const { code, type, message } = typeof error === 'object' && error !== null ? error as Record<string, unknown> : {}
  const named = [code, type].find(name => isText(name) || typeof name === 'number')
  return { code: named === undefined ? 'error' : String(named).slice(0, NAME_LENGTH), message: (isText(message) ? message as string : typeof error === 'string' ? error.trim() || 'an answer without a body' : JSON.stringify(error)).slice(0, MESSAGE_LENGTH) }
}

async function beginningOf (body: Dispatcher.ResponseData['body']): Promise<string> {
  const chunks: Buffer[] = []
  let length = 0
  for await (const chunk of body) {
    chunks.push(chunk as Buffer)
    length += (chunk as Buffer).length
    if (length > ANSWER_LENGTH) break
  }
  return Buffer.concat(chunks).toString()
}

function textOf (header: string | string[] | undefined): string | undefined {
  return Array.isArray(header) ? header[0] : header
}
