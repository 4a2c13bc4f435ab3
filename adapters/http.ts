/**
 * The one HTTP client of the adapters: undici's `dispatch` with a handler of its own. A third-party adapter may use it
 * too: `postStream` for generation, `requestJson` for everything small.
 */
import { Agent, type Dispatcher } from 'undici'
import { AdapterError, type AdapterNode, type Call, type UpstreamResponse } from './adapter.ts'
import { failureError, parseJson, readFailure, type FailureReader } from './http/answers.ts'
import { Exchange } from './http/exchange.ts'
import { isStaleSocket, unavailable } from './http/failures.ts'
import { firstEvent, isBegun } from './http/first-event.ts'
import { joinPath, targetOf } from './http/target.ts'

export type { FailureReader, UpstreamErrorObject, UpstreamFailure } from './http/answers.ts'
export { errorObject, failureError } from './http/answers.ts'
export { codeOf } from './http/failures.ts'

/**
 * Up to here slices are joined into one Buffer, which is sent in one write. Above, the copy costs more than the extra
 * writes: 1 MiB in three slices takes 0.3 ms of CPU as slices and 0.8 ms joined; at 16 KiB the two are even.
 */
const JOIN_LIMIT = 64 * 1024
const DEFAULT_TIMEOUT = 10_000
const DEFAULT_LIMIT = 4 * 1024 * 1024

/**
 * A dispatcher fit for model servers: unlimited connections (each stream holds one), and idle ones closed well before
 * uvicorn closes them (5 s), as undici's timers are up to a second late.
 */
export function createDispatcher (options: { connectTimeout?: number | undefined } = {}): Dispatcher {
  return new Agent({ keepAliveTimeout: 2500, connect: { timeout: options.connectTimeout ?? 5000 } })
}

export interface HttpRequest {
  readonly method: 'GET' | 'POST' | 'DELETE'
  /** Path below the node's URL, with query. */
  readonly path: string
  /** Slices of a JSON body. */
  readonly body?: readonly Buffer[] | undefined
  readonly headers?: Readonly<Record<string, string>> | undefined
  /** Milliseconds for the whole exchange; 0 (default) leaves it to the call's signal. */
  readonly timeout?: number | undefined
  /** Sent again once when a kept connection breaks before an answer; with these headers, if any, that tell the second try. */
  readonly idempotent?: boolean | Readonly<Record<string, string>> | undefined
}

function headersOf (node: AdapterNode, request: Pick<HttpRequest, 'headers'>, call: Call, length: number | undefined): string[] {
  const headers: string[] = []
  for (const name in call.headers) headers.push(name, call.headers[name]!)
  for (const name in request.headers) headers.push(name, request.headers[name]!)
  if (node.apiKey !== undefined) headers.push('authorization', `Bearer ${node.apiKey}`)
  if (length !== undefined) headers.push('content-type', 'application/json', 'content-length', String(length))
  return headers
}

function lengthOf (slices: readonly Buffer[]): number {
  let length = 0
  for (let i = 0; i < slices.length; i++) length += slices[i]!.length
  return length
}

function bodyOf (slices: readonly Buffer[], length: number): Buffer | readonly Buffer[] {
  if (slices.length === 1) return slices[0]!
  return length <= JOIN_LIMIT ? Buffer.concat(slices, length) : slices
}

function dispatch (node: AdapterNode, method: HttpRequest['method'], request: Omit<HttpRequest, 'method'>, call: Call): Promise<Exchange> {
  const end = call.end ?? call.signal
  const exchange = new Exchange(node, end, request.timeout ?? 0)
  if (end.aborted) return exchange.head
  const target = targetOf(node)
  const length = request.body === undefined ? undefined : lengthOf(request.body)
  const options = {
    origin: target.origin,
    path: joinPath(target, request.path),
    method,
    headers: headersOf(node, request, call, length),
    // undici takes any iterable; its types name only some.
    body: length === undefined ? null : bodyOf(request.body!, length) as Buffer,
    headersTimeout: 0,
    bodyTimeout: 0
  }
  try {
    call.dispatcher.dispatch(options, exchange)
  } catch (error) {
    exchange.destroy(unavailable(node, error as Error))
  }
  return exchange.head
}

/**
 * Sends a request and resolves at the head of the answer, whatever its status.
 * Throws AdapterError UNAVAILABLE when none comes, or the signal's reason.
 */
export function send (node: AdapterNode, request: HttpRequest, call: Call): Promise<Exchange> {
  const sent = dispatch(node, request.method, request, call)
  const { idempotent = false } = request
  if (idempotent === false) return sent
  return sent.catch((error: unknown) => {
    if (!isStaleSocket(error) || (call.end ?? call.signal).aborted) throw error
    return dispatch(node, request.method, idempotent === true ? request : { ...request, headers: { ...request.headers, ...idempotent } }, call)
  })
}

/**
 * POSTs a generation request and resolves at the first good event of the answer: the first SSE event that is no error,
 * or the first bytes of a JSON body. Those bytes are still in the response. No timeout of its own: the call's signal ends it.
 * Throws AdapterError by the answer's status or error event (`read` may map them first), or the signal's reason.
 */
export async function postStream (node: AdapterNode, request: Omit<HttpRequest, 'method' | 'idempotent'>, call: Call, read?: FailureReader): Promise<UpstreamResponse> {
  const response = await dispatch(node, 'POST', request, call)
  if (response.statusCode >= 300) throw failureError(await readFailure(node, response), read)
  if (isBegun(response)) return response
  try {
    const failure = await firstEvent(node, response)
    if (failure !== undefined) throw failureError(failure, read)
    return response
  } catch (error) {
    response.destroy(error as Error)
    throw error
  }
}

export interface JsonRequest extends Omit<HttpRequest, 'body'> {
  /** Value of the JSON body, or slices of its text. */
  readonly json?: unknown
  readonly slices?: readonly Buffer[] | undefined
  /** Longest answer in bytes; default 4 MiB. */
  readonly limit?: number | undefined
}

export interface JsonAnswer {
  readonly statusCode: number
  readonly headers: Readonly<Record<string, string | string[]>>
  /** The parsed body; undefined when it is not JSON. */
  readonly body: unknown
}

/**
 * A small control call: JSON out, JSON in, within `timeout` (default 10 s) and `limit`. Gives every status.
 * Throws AdapterError UNAVAILABLE when no whole answer comes, or the signal's reason.
 */
export async function requestJson (node: AdapterNode, request: JsonRequest, call: Call): Promise<JsonAnswer> {
  const { json, slices, limit = DEFAULT_LIMIT, timeout = DEFAULT_TIMEOUT, ...rest } = request
  const body = slices ?? (json === undefined ? undefined : [Buffer.from(JSON.stringify(json))])
  const response = await send(node, { ...rest, timeout, body }, call)
  return { statusCode: response.statusCode, headers: response.headers, body: parseJson(await response.buffer(limit)) }
}

/** As {@link requestJson}, and throws AdapterError for every status that is not 2xx. */
export async function requestOk (node: AdapterNode, request: JsonRequest, call: Call, read?: FailureReader): Promise<unknown> {
  const { json, slices, limit = DEFAULT_LIMIT, timeout = DEFAULT_TIMEOUT, ...rest } = request
  const body = slices ?? (json === undefined ? undefined : [Buffer.from(JSON.stringify(json))])
  const response = await send(node, { ...rest, timeout, body }, call)
  if (response.statusCode >= 300) throw failureError(await readFailure(node, response), read)
  const answer = parseJson(await response.buffer(limit))
  if (answer === undefined) throw new AdapterError('UNAVAILABLE', `${node.id} answered ${request.path} with something that is not JSON`, { node: node.id })
  return answer
}
