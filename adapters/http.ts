/**
 * The one HTTP client of the adapters, on undici. A third-party adapter may use it too: `postStream` for generation,
 * `requestJson` and `requestOk` (http/json.ts) for everything small.
 */
import type { Readable } from 'node:stream'
import type { Dispatcher } from 'undici'
import type { AdapterNode, Call, CallSignal, UpstreamResponse } from './adapter.ts'
import { checkedAnswer } from './http/answer-check.ts'
import { anotherTry } from './http/connections.ts'
import { nonsense, secondFailure, unavailable, type FailureReader } from './http/failures.ts'
import { readableOf, type FlowingResponse, type Sink } from './flow.ts'

export type { FailureReader, UpstreamFailure } from './http/failures.ts'
export type { UpstreamErrorObject } from './http/error-shape.ts'
export { errorObject } from './http/error-shape.ts'
export { codeOf, failureError } from './http/failures.ts'

/**
 * Up to here slices are joined into one Buffer, which is sent in one write. Above, the copy costs more than the extra
 * writes: 1 MiB in three slices takes 0.3 ms of CPU as slices and 0.8 ms joined; at 16 KiB the two are even.
 */
const JOIN_LIMIT = 64 * 1024
/** Longest JSON answer that is parsed to see that it is one, in bytes: 1 KiB takes 4 us. */
const WHOLE_LIMIT = 64 * 1024

export interface HttpRequest {
  /** @default 'POST' */
  readonly method?: 'GET' | 'POST' | 'DELETE'
  /** Path below the node's URL, with query. */
  readonly path: string
  /** Slices of a body, of JSON unless `contentType` says otherwise. */
  readonly body?: readonly Buffer[] | undefined
  readonly contentType?: string | undefined
  readonly headers?: Readonly<Record<string, string>> | undefined
  /** Sent again once when a kept connection breaks before an answer; with these headers, if any, which mark the second try. */
  readonly idempotent?: boolean | Readonly<Record<string, string>> | undefined
}

/**
 * Sends a request and resolves at the head of the answer, whatever its status. A request that met a kept connection which
 * the server had closed is sent again once, on a fresh one.
 * Throws AdapterError UNAVAILABLE when no head comes, or the signal's reason.
 */
export async function send (node: AdapterNode, request: HttpRequest, call: Call): Promise<UpstreamAnswer> {
  const { idempotent = false } = request
  const sentAt = performance.now()
  try {
    return await sendOnce(node, request, call)
  } catch (error) {
    const dispatcher = call.signal.aborted ? undefined : anotherTry(error, sentAt, idempotent !== false, call.dispatcher)
    if (dispatcher === undefined) throw error
    const marked = typeof idempotent === 'object' ? { ...request, headers: { ...request.headers, ...idempotent } } : request
    return await sendOnce(node, marked, { ...call, dispatcher }).catch((second: unknown) => { throw secondFailure(second) })
  }
}

function sendOnce (node: AdapterNode, { method = 'POST', path, headers, body, contentType = 'application/json' }: HttpRequest, call: Call): Promise<UpstreamAnswer> {
  if (call.signal.aborted) throw call.signal.reason
  const target = targetOf(node)
  const length = body?.reduce((sum, slice) => sum + slice.length, 0)
  const answer = new UpstreamAnswer(node, call.signal)
  const options = {
    origin: target.origin,
    path: target.prefix + path,
    method,
    headers: headersOf(node, headers, call, length, contentType),
    // undici takes any iterable; its types name only some.
    body: length === undefined ? null : bodyOf(body!, length) as Buffer,
    // The call's signal ends it.
    headersTimeout: 0,
    bodyTimeout: 0
  }
  try {
    call.dispatcher.dispatch(options, answer)
  } catch (error) {
    answer.onResponseError(undefined, error as Error)
  }
  return answer.head
}

function headersOf (node: AdapterNode, own: HttpRequest['headers'], call: Call, length: number | undefined, contentType: string): string[] {
  const headers: string[] = []
  for (const name in call.headers) headers.push(name, call.headers[name]!)
  for (const name in own) headers.push(name, own[name]!)
  if (node.apiKey !== undefined) headers.push('authorization', `Bearer ${node.apiKey}`)
  if (length !== undefined) headers.push('content-type', contentType, 'content-length', String(length))
  return headers
}

function bodyOf (slices: readonly Buffer[], length: number): Buffer | readonly Buffer[] {
  if (slices.length === 1) return slices[0]!
  return length <= JOIN_LIMIT ? Buffer.concat(slices, length) : slices
}

type Controller = Dispatcher.DispatchController

/** Bytes that wait for a reader before the node is paused. */
const READ_AHEAD = 64 * 1024

/**
 * One answer: undici's handler and the response in one object; undici's own `request`, which makes five, adds 22 % to the
 * CPU of a text request. Most answers that are not streamed come whole with their head, and are taken as bytes.
 */
export class UpstreamAnswer implements FlowingResponse, Dispatcher.DispatchHandler {
  statusCode = 0
  headers: Record<string, string | string[]> = {}
  /** Resolves when status and headers are there. Rejects with UNAVAILABLE or the signal's reason. */
  readonly head: Promise<UpstreamAnswer>
  readonly #node: AdapterNode
  readonly #signal: CallSignal
  readonly #onAbort = (): void => { this.#break(this.#signal.reason as Error) }
  #controller: Controller | undefined
  #resolve!: (response: UpstreamAnswer) => void
  #reject!: (error: Error) => void
  /** What has come, while it goes nowhere. */
  #held: Buffer | undefined
  #sink: Sink | undefined
  #body: Readable | undefined
  #whole = false
  #broken: Error | undefined
  #completion: Completion | undefined
  /** Bytes of a 500 that have come. */
  #length = 0

  constructor (node: AdapterNode, signal: CallSignal) {
    this.#node = node
    this.#signal = signal
    this.head = new Promise((resolve, reject) => { this.#resolve = resolve; this.#reject = reject })
    signal.addEventListener('abort', this.#onAbort)
  }

  get body (): Readable {
    return (this.#body ??= readableOf(this))
  }

  get flowing (): boolean {
    return this.#body === undefined
  }

  flow (sink: Sink): void {
    const held = this.#held
    this.#held = undefined
    this.#sink = sink
    if (this.#broken !== undefined) { sink.error(this.#broken); return }
    if (held !== undefined) sink.data(held)
    if (this.#sink !== sink) return
    if (this.#whole) sink.end()
    else this.resume()
  }

  hold (held: Buffer): void {
    this.#sink = undefined
    if (held.length > 0) this.#held = held
  }

  pause (): void {
    this.#controller?.pause()
  }

  resume (): void {
    this.#controller?.resume()
  }

  onRequestStart (controller: Controller): void {
    this.#controller = controller
    if (this.#broken !== undefined) controller.abort(this.#broken)
  }

  onResponseStart (_controller: Controller, statusCode: number, headers: Record<string, string | string[]>): void {
    if (statusCode < 200) return
    // No status is above, and no answer to a client can have it.
    if (statusCode > 599) { this.#break(nonsense(this.#node, `status ${statusCode}`)); return }
    this.statusCode = statusCode
    this.headers = headers
    if (Array.isArray(headers['content-type'])) headers['content-type'] = headers['content-type'][0]!
    this.#resolve(this)
  }

  onResponseData (controller: Controller, chunk: Buffer): void {
    // undici hands out an empty chunk when it resumes with nothing read.
    if (chunk.length === 0) return
    if (this.#sink !== undefined) this.#sink.data(chunk)
    else {
      this.#held = this.#held === undefined ? chunk : Buffer.concat([this.#held, chunk])
      if (this.#held.length >= READ_AHEAD) controller.pause()
    }
    if (this.statusCode === 500) this.#dropAtEnd(controller, chunk)
  }

  onResponseEnd (): void {
    if (this.#whole) return
    this.#whole = true
    this.#sink?.end()
  }

  /**
   * uvicorn closes a connection 20 ms after a 500 that its application has not handled, without saying so: the next
   * request on it would break. undici closes no connection after an answer, but it does within one.
   */
  #dropAtEnd (controller: Controller, chunk: Buffer): void {
    this.#length += chunk.length
    if (this.#whole || this.#length !== Number(this.headers['content-length'])) return
    this.onResponseEnd()
    controller.abort(unwanted())
  }

  onResponseError (_controller: Controller | undefined, error: Error): void {
    if (!this.#whole) this.#break(this.statusCode === 0 ? unavailable(this.#node, error) : error)
  }

  /** Is all of a completion here, in one chunk? */
  isCompletion (): boolean {
    const { statusCode, headers } = this
    const bytes = this.#held
    if (statusCode !== 200 || !this.#whole || bytes === undefined || bytes.length > WHOLE_LIMIT || headers['content-length'] !== String(bytes.length) || !String(headers['content-type']).startsWith('application/json')) return false
    try {
      const value = JSON.parse(bytes.toString()) as Completion['value'] & { error?: unknown }
      const good = Array.isArray(value.choices) && typeof value.choices[0] === 'object' && value.choices[0] !== null && (value.error ?? undefined) === undefined
      if (good) this.#completion = { bytes, value }
      return good
    } catch {
      return false
    }
  }

  /** The completion, unless its bytes have gone elsewhere. */
  takeCompletion (): Completion | undefined {
    if (this.#held === undefined || this.#completion === undefined) return undefined
    this.#signal.removeEventListener('abort', this.#onAbort)
    return this.#completion
  }

  #break (error: Error): void {
    this.close(error)
    this.#sink?.error(error)
  }

  close (error: Error | null): void {
    this.#signal.removeEventListener('abort', this.#onAbort)
    if (this.#broken !== undefined || (this.#whole && error === null)) return
    this.#broken = error ?? unwanted()
    this.#reject(this.#broken)
    if (!this.#whole) this.#controller?.abort(this.#broken)
  }
}

function unwanted (): Error {
  return new Error('the answer is not wanted')
}

/** Where requests to a node go. */
interface Target {
  readonly origin: string
  /** Path below the origin, without a slash or the `/v1` of OpenAI clients' base URLs at its end. */
  readonly prefix: string
}

const targets = new Map<string, Target>()
const MAX_TARGETS = 1024

/** Splits a node's base URL, once per URL. */
export function targetOf (node: AdapterNode): Target {
  let target = targets.get(node.url)
  if (target === undefined) {
    const { origin, pathname } = new URL(node.url)
    target = { origin, prefix: pathname.replace(/(\/v1)?\/*$/, '') }
    if (targets.size >= MAX_TARGETS) targets.clear()
    targets.set(node.url, target)
  }
  return target
}

/**
 * POSTs a generation request and resolves when its answer has begun and is one: at the first SSE event that is no error,
 * with all of a JSON body that is not too long, at the first bytes of another body. What has come is still in the response.
 * No timeout of its own: the call's signal ends it.
 * Throws AdapterError by the answer's status, error event or nonsense (`read` may map errors first), or the signal's reason.
 */
export async function postStream (node: AdapterNode, request: Omit<HttpRequest, 'method' | 'idempotent'>, call: Call, read?: FailureReader): Promise<UpstreamResponse> {
  const response = await send(node, request, call)
  return response.isCompletion() ? response : await checkedAnswer(node, request.path, response, call, read)
}

/** An answer that came whole, and was parsed to see that it is one. */
export interface Completion { readonly bytes: Buffer, readonly value: { readonly choices: readonly unknown[], readonly usage?: unknown } }

export function isEventStream (headers: UpstreamResponse['headers']): boolean {
  const type = headers['content-type']
  return typeof type === 'string' && /^text\/event-stream\b/i.test(type)
}
