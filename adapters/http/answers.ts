import { AdapterError, type AdapterNode } from '../adapter.ts'
import { openAiError } from '../wire/openai-error.ts'
import type { Exchange } from './exchange.ts'
import { retryAfterOf } from './failures.ts'

/** Longest error answer that is passed on to a client. */
const ERROR_LIMIT = 256 * 1024
/** Milliseconds an error answer may take after its head. */
const ERROR_TIMEOUT = 2000

/** An upstream error: an answer with a status of 400 or more, or an error event at the start of a stream. */
export interface UpstreamFailure {
  readonly node: AdapterNode
  readonly statusCode: number
  readonly contentType: string
  readonly body: Buffer
  /** The `error` object of OpenAI's shape, or what comes nearest to it. */
  readonly error: UpstreamErrorObject
  readonly retryAfter: number | undefined
}

export interface UpstreamErrorObject {
  readonly message?: string
  readonly type?: string
  readonly code?: string | number
  readonly param?: string | null
}

/** An adapter's own reading of a failure; undefined leaves it to the general rule. */
export type FailureReader = (failure: UpstreamFailure) => AdapterError | undefined

/** `{"error": {...}}` (OpenAI), `{"object": "error", ...}` (LMDeploy, older vLLM), `{"detail": ...}` (FastAPI), `{"error": "..."}`. */
export function errorObject (body: unknown): UpstreamErrorObject | undefined {
  if (typeof body !== 'object' || body === null) return undefined
  const { error, object, message, detail } = body as { error?: unknown, object?: unknown, message?: unknown, detail?: unknown }
  if (typeof error === 'object' && error !== null) return error as UpstreamErrorObject
  if (object === 'error' || error === true) return body as UpstreamErrorObject
  if (typeof error === 'string') return { message: error }
  if (typeof message === 'string') return body as UpstreamErrorObject
  return detail === undefined ? undefined : { message: typeof detail === 'string' ? detail : JSON.stringify(detail) }
}

export function parseJson (body: Buffer): unknown {
  try {
    return JSON.parse(body.toString('utf8'))
  } catch {
    return undefined
  }
}

/** Reads an answer with a status that is not 2xx. Never throws for the body's sake: the status says enough. */
export async function readFailure (node: AdapterNode, response: Exchange): Promise<UpstreamFailure> {
  const { statusCode, headers } = response
  const timer = setTimeout(() => { response.destroy(new Error('the error answer does not end')) }, ERROR_TIMEOUT).unref()
  const { body, complete } = await response.collect(ERROR_LIMIT).catch(() => ({ body: Buffer.alloc(0), complete: false }))
  clearTimeout(timer)
  const base = { node, statusCode, retryAfter: retryAfterOf(headers['retry-after']) }
  const error = complete ? errorObject(parseJson(body)) ?? {} : {}
  if (complete && body.length > 0) return { ...base, contentType: String(headers['content-type'] ?? 'application/json'), body, error }
  return { ...base, contentType: 'application/json', body: Buffer.from(JSON.stringify({ error: openAiError(statusCode, `the node answered ${statusCode}`, null) })), error }
}

/**
 * 4xx that are no fault of the client's. 401: the key a node gets is the gateway's. 408, 499: the node gave up on a
 * request that nobody here has cancelled, as when it shuts down.
 */
const NOT_THE_CLIENTS = new Set([401, 408, 499])

/** The general rule: 429 and 503 are BUSY, other 4xx REJECTED with the answer as it came, all else UNAVAILABLE. */
export function failureError (failure: UpstreamFailure, read?: FailureReader): AdapterError {
  const own = read?.(failure)
  if (own !== undefined) return own
  const { node, statusCode, contentType, body, error, retryAfter } = failure
  const text = typeof error.message === 'string' ? `: ${error.message.slice(0, 500)}` : ''
  const message = `${node.id} answered ${statusCode}${text}`
  if (statusCode === 429 || statusCode === 503) return new AdapterError('BUSY', message, { node: node.id, retryAfter })
  if (statusCode >= 400 && statusCode < 500 && !NOT_THE_CLIENTS.has(statusCode)) {
    return new AdapterError('REJECTED', message, { node: node.id, response: { statusCode, contentType, body } })
  }
  return new AdapterError('UNAVAILABLE', message, { node: node.id })
}
