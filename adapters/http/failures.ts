/** What a node's failure means: from broken connections, statuses and error events to an AdapterError. */
import type { Readable } from 'node:stream'
import { AdapterError, type AdapterNode, type UpstreamResponse } from '../adapter.ts'
import { openAiError } from '../wire/openai-error.ts'

/** Longest error answer that is passed on to a client, in bytes. */
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

const REASONS: Readonly<Record<string, string>> = {
  ECONNREFUSED: 'refuses connections',
  ECONNRESET: 'broke the connection off',
  EPIPE: 'broke the connection off',
  UND_ERR_SOCKET: 'broke the connection off',
  ENOTFOUND: 'has a host name that does not resolve',
  EHOSTUNREACH: 'is not reachable',
  ENETUNREACH: 'is not reachable',
  UND_ERR_CONNECT_TIMEOUT: 'did not accept a connection in time',
  ETIMEDOUT: 'did not accept a connection in time'
}

export function codeOf (error: unknown): string | undefined {
  const code = (error as { code?: unknown } | undefined)?.code
  return typeof code === 'string' ? code : undefined
}

/** No head came. */
export function unavailable (node: AdapterNode, cause: Error): AdapterError {
  const code = codeOf(cause)
  const reason = (code !== undefined ? REASONS[code] : undefined) ?? `can't be reached: ${cause.message}`
  return new AdapterError('UNAVAILABLE', `${node.id} ${reason}`, { node: node.id, cause })
}

/** The head came, the whole body did not. */
export function brokenOff (node: AdapterNode, cause: Error): AdapterError {
  return new AdapterError('UNAVAILABLE', `${node.id} broke its answer off: ${cause.message}`, { node: node.id, cause })
}

export function timedOut (node: AdapterNode, ms: number): AdapterError {
  const cause = Object.assign(new Error(`no answer within ${ms} ms`), { code: 'ETIMEDOUT' })
  return new AdapterError('UNAVAILABLE', `${node.id} did not answer within ${ms} ms`, { node: node.id, cause })
}

/** Did the peer close a kept connection while the request was written to it? Then it has not looked at any byte of it. */
export function isStaleSocket (error: unknown): boolean {
  if (!AdapterError.is(error)) return false
  const code = codeOf(error.cause)
  return code === 'ECONNRESET' || code === 'EPIPE' || code === 'UND_ERR_SOCKET'
}

/** Seconds of a Retry-After header, which is a number or a date. */
export function retryAfterOf (value: string | string[] | undefined, now = Date.now()): number | undefined {
  const text = Array.isArray(value) ? value[0] : value
  if (text === undefined) return undefined
  if (/^\d+$/.test(text.trim())) return Number(text)
  const date = Date.parse(text)
  return Number.isNaN(date) ? undefined : Math.max(0, Math.ceil((date - now) / 1000))
}

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

/** The whole body; undefined, and the connection closed, when it is longer than `limit` bytes. Rejects when it breaks off. */
export async function readWhole (body: Readable, limit: number): Promise<Buffer | undefined> {
  const chunks: Buffer[] = []
  let length = 0
  // Leaving the loop early destroys the stream.
  for await (const chunk of body as AsyncIterable<Buffer>) {
    length += chunk.length
    if (length > limit) return undefined
    chunks.push(chunk)
  }
  return chunks.length === 1 ? chunks[0] : Buffer.concat(chunks, length)
}

/** Reads an answer with a status that is not 2xx. Never throws because of the body: the status says enough. */
export async function readFailure (node: AdapterNode, { statusCode, headers, body }: UpstreamResponse): Promise<UpstreamFailure> {
  const timer = setTimeout(() => { body.destroy(new Error('the error answer does not end')) }, ERROR_TIMEOUT).unref()
  const bytes = await readWhole(body, ERROR_LIMIT).catch(() => undefined)
  clearTimeout(timer)
  const base = { node, statusCode, retryAfter: retryAfterOf(headers['retry-after']) }
  const error = bytes === undefined ? {} : errorObject(parseJson(bytes)) ?? {}
  if (bytes !== undefined && bytes.length > 0) return { ...base, contentType: String(headers['content-type'] ?? 'application/json'), body: bytes, error }
  return { ...base, contentType: 'application/json', body: Buffer.from(JSON.stringify({ error: openAiError(statusCode, `the node answered ${statusCode}`, null) })), error }
}

/** OpenAI's and our engines' string codes that stand for a status; numbers stand for themselves. */
const STATUS_OF_CODE: Readonly<Record<string, number>> = {
  busy: 503,
  draining: 503,
  initialising: 503,
  engine_unavailable: 503,
  rate_limit_exceeded: 429,
  internal: 500,
  internal_error: 500,
  server_error: 500,
  cancelled: 500
}

function statusOf ({ code, type }: UpstreamErrorObject): number {
  const number = typeof code === 'number' ? code : Number(code)
  if (number >= 400 && number < 600) return number
  const named = (typeof code === 'string' ? STATUS_OF_CODE[code] : undefined) ?? (typeof type === 'string' ? STATUS_OF_CODE[type] : undefined)
  if (named !== undefined) return named
  return type === 'invalid_request_error' || type === 'BadRequestError' ? 400 : 500
}

/** The failure that the data of a stream's first event stands for; undefined for a good event. */
export function failureOfEvent (node: AdapterNode, data: Buffer): UpstreamFailure | undefined {
  // Good events of every backend start with {"id" or {"object"; only "error" in the first bytes is worth parsing.
  if (data.subarray(0, 64).indexOf('error') < 0) return undefined
  const parsed = parseJson(data)
  const isError = typeof parsed === 'object' && parsed !== null && ('error' in parsed || (parsed as { object?: unknown }).object === 'error')
  const error = isError ? errorObject(parsed) : undefined
  if (error === undefined) return undefined
  const body = Buffer.from(JSON.stringify({ error }))
  return { node, statusCode: statusOf(error), contentType: 'application/json', body, error, retryAfter: undefined }
}

/**
 * 4xx that are not the client's fault. 401: the key a node gets is the gateway's. 408, 499: the node gave up on a
 * request that the gateway has not cancelled, as when the node shuts down.
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
