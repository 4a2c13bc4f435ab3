/**
 * The one HTTP client of the adapters, on undici. A third-party adapter may use it too: `postStream` for generation,
 * `requestJson` and `requestOk` (http/json.ts) for everything small.
 */
import { Readable } from 'node:stream'
import type { Dispatcher } from 'undici'
import { AdapterError, type AdapterNode, type Call, type CallSignal, type UpstreamResponse } from './adapter.ts'
import { brokenOff, failureError, failureOfEvent, isStaleSocket, readFailure, unavailable, type FailureReader, type UpstreamFailure } from './http/failures.ts'

export type { FailureReader, UpstreamErrorObject, UpstreamFailure } from './http/failures.ts'
export { codeOf, errorObject, failureError } from './http/failures.ts'

/**
 * Up to here slices are joined into one Buffer, which is sent in one write. Above, the copy costs more than the extra
 * writes: 1 MiB in three slices takes 0.3 ms of CPU as slices and 0.8 ms joined; at 16 KiB the two are even.
 */
const JOIN_LIMIT = 64 * 1024
/** A first event longer than this is taken for a good one, in bytes. */
const FIRST_EVENT_LIMIT = 64 * 1024

export interface HttpRequest {
  readonly method: 'GET' | 'POST' | 'DELETE'
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
 * Sends a request and resolves at the head of the answer, whatever its status.
 * Throws AdapterError UNAVAILABLE when none comes, or the signal's reason.
 */
export async function send (node: AdapterNode, request: HttpRequest, call: Call): Promise<UpstreamResponse> {
  const { idempotent = false } = request
  try {
    return await sendOnce(node, request, call)
  } catch (error) {
    if (idempotent === false || call.signal.aborted || !isStaleSocket(error)) throw error
    return await sendOnce(node, idempotent === true ? request : { ...request, headers: { ...request.headers, ...idempotent } }, call)
  }
}

async function sendOnce (node: AdapterNode, { method, path, headers, body, contentType = 'application/json' }: HttpRequest, call: Call): Promise<UpstreamResponse> {
  if (call.signal.aborted) throw call.signal.reason
  const target = targetOf(node)
  const length = body?.reduce((sum, slice) => sum + slice.length, 0)
  const answer = new UpstreamBody(node, call.signal)
  const options = {
    origin: target.origin,
    path: joinPath(target, path),
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
  return await answer.head
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

/**
 * One answer: undici's handler, the response and its body in one object. undici's own `request`, which makes five, adds
 * 22 % to the CPU of a text request.
 */
class UpstreamBody extends Readable implements UpstreamResponse, Dispatcher.DispatchHandler {
  statusCode = 0
  headers: Record<string, string | string[]> = {}
  /** Resolves when status and headers are there. Rejects with UNAVAILABLE or the signal's reason. */
  readonly head: Promise<UpstreamResponse>
  readonly #node: AdapterNode
  readonly #signal: CallSignal
  readonly #onAbort = (): void => { this.destroy(this.#signal.reason as Error) }
  #controller: Controller | undefined
  #resolve!: (response: UpstreamResponse) => void
  #reject!: (error: Error) => void
  #whole = false
  /** Bytes of a 500 that have come. */
  #length = 0

  constructor (node: AdapterNode, signal: CallSignal) {
    super({ highWaterMark: 64 * 1024 })
    this.#node = node
    this.#signal = signal
    this.head = new Promise((resolve, reject) => { this.#resolve = resolve; this.#reject = reject })
    // It may break off before its reader listens, and an error without a listener would end the process.
    this.on('error', ignore)
    signal.addEventListener('abort', this.#onAbort)
  }

  get body (): this {
    return this
  }

  onRequestStart (controller: Controller): void {
    this.#controller = controller
    if (this.destroyed) controller.abort(this.errored ?? unwanted())
  }

  onResponseStart (_controller: Controller, statusCode: number, headers: Record<string, string | string[]>): void {
    if (statusCode < 200) return
    this.statusCode = statusCode
    this.headers = headers
    this.#resolve(this)
  }

  onResponseData (controller: Controller, chunk: Buffer): void {
    // undici hands out an empty chunk when it resumes with nothing read.
    if (chunk.length > 0 && !this.push(chunk)) controller.pause()
    if (this.statusCode === 500) this.#dropAtEnd(controller, chunk)
  }

  onResponseEnd (): void {
    if (this.#whole) return
    this.#whole = true
    this.push(null)
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
    if (!this.#whole) this.destroy(this.statusCode === 0 ? unavailable(this.#node, error) : error)
  }

  override _read (): void {
    this.#controller?.resume()
  }

  override _destroy (error: Error | null, callback: (error: Error | null) => void): void {
    this.#signal.removeEventListener('abort', this.#onAbort)
    if (!this.#whole) {
      const reason = error ?? unwanted()
      this.#reject(reason)
      this.#controller?.abort(reason)
    }
    callback(error)
  }
}

function ignore (): void {}

function unwanted (): Error {
  return new Error('the answer is not wanted')
}

/** Where requests to a node go. */
interface Target {
  readonly origin: string
  /** Path below the origin, without a slash at its end. */
  readonly prefix: string
}

const targets = new Map<string, Target>()
const MAX_TARGETS = 1024

/** Splits a node's base URL, once per URL. */
export function targetOf (node: AdapterNode): Target {
  let target = targets.get(node.url)
  if (target === undefined) {
    const { origin, pathname } = new URL(node.url)
    target = { origin, prefix: pathname.replace(/\/+$/, '') }
    if (targets.size >= MAX_TARGETS) targets.clear()
    targets.set(node.url, target)
  }
  return target
}

/** Joins a node's base path with a path of the API. A base URL that already ends in `/v1` does not get a second one. */
export function joinPath ({ prefix }: Target, path: string): string {
  return prefix.endsWith('/v1') && path.startsWith('/v1/') ? prefix + path.slice(3) : prefix + path
}

/**
 * POSTs a generation request and resolves at the first good event of the answer: the first SSE event that is no error,
 * or the first bytes of a JSON body. Those bytes are still in the response. No timeout of its own: the call's signal ends it.
 * Throws AdapterError by the answer's status or error event (`read` may map them first), or the signal's reason.
 */
export async function postStream (node: AdapterNode, request: Omit<HttpRequest, 'method' | 'idempotent'>, call: Call, read?: FailureReader): Promise<UpstreamResponse> {
  const response = await sendOnce(node, { ...request, method: 'POST' }, call)
  if (response.statusCode >= 300) throw failureError(await readFailure(node, response), read)
  try {
    const failure = await firstFailure(node, response)
    if (failure === undefined) return response
    throw failureError(failure, read)
  } catch (error) {
    response.body.destroy()
    throw call.signal.aborted ? call.signal.reason : AdapterError.is(error) ? error : brokenOff(node, error as Error)
  }
}

/** Waits for the first event of a stream, or the first bytes of another body, and leaves them in it. Gives the failure that an error event stands for. */
async function firstFailure (node: AdapterNode, { headers, body }: UpstreamResponse): Promise<UpstreamFailure | undefined> {
  if (!isEventStream(headers)) {
    // Most JSON answers have come whole with their head.
    if (body.readableLength === 0) await peek(body, () => true)
    return undefined
  }
  const bytes = await peek(body, bytes => bytes.length > FIRST_EVENT_LIMIT || firstData(bytes) !== undefined)
  if (bytes === undefined) throw new Error('the stream ended before its first event')
  const data = firstData(bytes)
  return data === undefined ? undefined : failureOfEvent(node, data)
}

export function isEventStream (headers: UpstreamResponse['headers']): boolean {
  const type = headers['content-type']
  return typeof type === 'string' && /^text\/event-stream\b/i.test(type)
}

/** Reads until there is enough and puts it back. Undefined when the body ends before; rejects when it breaks off. */
function peek (body: Readable, enough: (bytes: Buffer) => boolean): Promise<Buffer | undefined> {
  let bytes: Buffer | undefined
  const look = (): boolean => {
    const chunk = body.read() as Buffer | null
    if (chunk === null) return false
    bytes = bytes === undefined ? chunk : Buffer.concat([bytes, chunk])
    if (!enough(bytes)) return false
    body.unshift(bytes)
    return true
  }
  return new Promise((resolve, reject) => {
    if (look()) { resolve(bytes); return }
    const settle = (): void => { for (const [event, listener] of listeners) body.off(event, listener) }
    const listeners: ReadonlyArray<readonly [string, (error?: Error) => void]> = [
      ['readable', () => { if (look()) { settle(); resolve(bytes) } }],
      ['end', () => { settle(); resolve(undefined) }],
      ['close', () => { settle(); reject(body.errored ?? new Error('it was closed')) }]
    ]
    for (const [event, listener] of listeners) body.on(event, listener)
  })
}

const LF = 0x0a
const CR = 0x0d
const DATA = Buffer.from('data:')

/** The first `data:` line that is whole; `undefined` when there is none yet. Comments and other fields are skipped. */
export function firstData (bytes: Buffer): Buffer | undefined {
  let start = 0
  for (;;) {
    const end = bytes.indexOf(LF, start)
    if (end < 0) return undefined
    if (bytes.compare(DATA, 0, DATA.length, start, Math.min(start + DATA.length, end)) === 0) {
      return bytes.subarray(start + DATA.length, bytes[end - 1] === CR ? end - 1 : end)
    }
    start = end + 1
  }
}
