/** Small control calls of the adapters: JSON out, JSON in. */
import { AdapterError, type AdapterNode, type Call, type UpstreamResponse } from '../adapter.ts'
import { TimeLimit } from '../abort.ts'
import { send, type HttpRequest } from '../http.ts'
import { brokenOff, failureError, nonsense, parseJson, readFailure, readWhole, timedOut, type FailureReader } from './failures.ts'

const DEFAULT_TIMEOUT = 10_000
const DEFAULT_LIMIT = 4 * 1024 * 1024

export interface JsonRequest extends Omit<HttpRequest, 'body'> {
  /** Value of the JSON body, or slices of its text. */
  readonly json?: unknown
  readonly slices?: readonly Buffer[] | undefined
  /** Milliseconds for the whole exchange; 0 leaves it to the call's signal. @default 10 000 */
  readonly timeout?: number | undefined
  /** Longest answer in bytes. @default 4 MiB */
  readonly limit?: number | undefined
}

export interface JsonAnswer {
  readonly statusCode: number
  readonly headers: UpstreamResponse['headers']
  /** The parsed body; undefined when it is not JSON. */
  readonly body: unknown
}

/**
 * A small control call: JSON out, JSON in, within `timeout` and `limit`. Gives every status.
 * Throws AdapterError UNAVAILABLE when no whole answer comes, or the signal's reason.
 */
export async function requestJson (node: AdapterNode, request: JsonRequest, call: Call): Promise<JsonAnswer> {
  return await exchangeJson(node, request, call, async response => response)
}

/** As {@link requestJson}, and throws AdapterError for every status that is not 2xx. */
export async function requestOk (node: AdapterNode, request: JsonRequest, call: Call, read?: FailureReader): Promise<unknown> {
  const { body } = await exchangeJson(node, request, call, async response => {
    if (response.statusCode >= 300) throw failureError(await readFailure(node, response), read)
  })
  if (body === undefined) throw nonsense(node, `something that is not JSON on ${request.path}`)
  return body
}

/** @param check - sees the head; may reject in place of the body's reading */
async function exchangeJson (node: AdapterNode, request: JsonRequest, call: Call, check: (response: UpstreamResponse) => Promise<unknown>): Promise<JsonAnswer> {
  const { json, slices, limit = DEFAULT_LIMIT, timeout = DEFAULT_TIMEOUT, ...rest } = request
  const body = slices ?? (json === undefined ? undefined : [Buffer.from(JSON.stringify(json))])
  const time = new TimeLimit(timeout, call.signal)
  try {
    const response = await send(node, { body, ...rest }, { ...call, signal: time })
    await check(response)
    const bytes = await readWhole(response.body, limit)
    if (bytes === undefined) throw nonsense(node, `an answer longer than ${limit} bytes`)
    return { statusCode: response.statusCode, headers: response.headers, body: parseJson(bytes) }
  } catch (error) {
    if (time.timedOut) throw timedOut(node, timeout)
    if (call.signal.aborted) throw call.signal.reason
    throw AdapterError.is(error) ? error : brokenOff(node, error as Error)
  } finally {
    time.clear()
  }
}
