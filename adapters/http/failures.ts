/** What a node's failure means: from broken connections, statuses and error events to an AdapterError. */
import type { Readable } from 'node:stream'
import { brotliDecompressSync, gunzipSync, inflateSync } from 'node:zlib'
import { AdapterError, type AdapterNode, type UpstreamResponse } from '../adapter.ts'
import { errorObject, hasOpenAiShape, openAiShape, statusOf, type UpstreamErrorObject } from './error-shape.ts'

/** Longest error answer that is passed on to a client, in bytes. */
const ERROR_LIMIT = 256 * 1024
/** Milliseconds an error answer may take after its head. */
const ERROR_TIMEOUT = 2000

/** An upstream error: an answer with a status of 400 or more, or an error event at the start of a stream. */
export interface UpstreamFailure {
  readonly node: AdapterNode
  readonly statusCode: number
  readonly contentType: string
  /** In OpenAI's shape: as it came where it has it, else written anew. */
  readonly body: Buffer
  readonly headers: UpstreamResponse['headers']
  /** The `error` object of OpenAI's shape, or what comes nearest to it. */
  readonly error: UpstreamErrorObject
  readonly retryAfter: number | undefined
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

/** undici's words, of a request's connection, for this only: it asks for no 100 Continue, and passes over other interim answers (102, 103). */
const UNASKED_100 = 'bad response'

export function codeOf (error: unknown): string | undefined {
  const code = (error as { code?: unknown } | undefined)?.code
  return typeof code === 'string' ? code : undefined
}

/** Codes of a connection that broke when it was there; with all others there was none. */
const CUT: ReadonlySet<string | undefined> = new Set(['ECONNRESET', 'EPIPE', 'UND_ERR_SOCKET'])

/** No head came. */
export function unavailable (node: AdapterNode, cause: Error): AdapterError {
  const code = codeOf(cause)
  const reason = cause.message === UNASKED_100 ? 'sent 100 Continue without being asked, which undici takes for the end' : (code !== undefined ? REASONS[code] : undefined) ?? `can't be reached: ${cause.message}`
  const how = CUT.has(code) || code?.startsWith('HPE_') === true ? 'cut' : 'unreachable'
  return new AdapterError('UNAVAILABLE', `${node.id} ${reason}`, { node: node.id, cause, how })
}

/** The failure of a second try after a connection was cut. A node that can't be reached then may have gone down under the first one. */
export function secondFailure (second: unknown): unknown {
  if (!AdapterError.is(second) || second.how !== 'unreachable') return second
  return new AdapterError('UNAVAILABLE', second.message, { node: second.node, cause: second.cause, how: 'cut' })
}

/** The head came, the whole body did not. */
export function brokenOff (node: AdapterNode, cause: Error): AdapterError {
  return new AdapterError('UNAVAILABLE', `${node.id} broke its answer off: ${cause.message}`, { node: node.id, cause, how: 'cut' })
}

export function timedOut (node: AdapterNode, ms: number): AdapterError {
  const cause = Object.assign(new Error(`no answer within ${ms} ms`), { code: 'ETIMEDOUT' })
  return new AdapterError('UNAVAILABLE', `${node.id} did not answer within ${ms} ms`, { node: node.id, cause, how: 'late' })
}

/** A good status, and no answer with it. */
export function nonsense (node: AdapterNode, what: string): AdapterError {
  return new AdapterError('UNAVAILABLE', `${node.id} answered with ${what}`, { node: node.id, how: 'nonsense' })
}

/** Seconds of a Retry-After header, which is a number or a date. */
export function retryAfterOf (value: string | string[] | undefined, now = Date.now()): number | undefined {
  const text = Array.isArray(value) ? value[0] : value
  if (text === undefined) return undefined
  if (/^\d+$/.test(text.trim())) return Number(text)
  const date = Date.parse(text)
  return Number.isNaN(date) ? undefined : Math.max(0, Math.ceil((date - now) / 1000))
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
  const encoding = String(headers['content-encoding'] ?? 'identity')
  const plain = bytes === undefined ? undefined : decoded(bytes, encoding)
  // What can't be read here may be readable to the client.
  if (plain === undefined && bytes !== undefined) return { ...failure(node, statusCode, {}, headers), contentType: String(headers['content-type']), body: bytes, headers }
  const value = plain === undefined ? undefined : parseJson(plain)
  const found = failure(node, statusCode, errorObject(value) ?? {}, headers, textOf(plain, headers))
  return hasOpenAiShape(value) ? { ...found, contentType: String(headers['content-type'] ?? JSON_TYPE), body: plain! } : found
}

const JSON_TYPE = 'application/json'

/** The failure in OpenAI's shape. Headers of the answer's old body are out. */
function failure (node: AdapterNode, statusCode: number, error: UpstreamErrorObject, all: UpstreamResponse['headers'], reason: UpstreamErrorObject = {}): UpstreamFailure {
  const { 'content-encoding': _encoding, 'content-length': _length, 'transfer-encoding': _transfer, 'content-type': _type, etag: _etag, ...headers } = all
  const body = Buffer.from(JSON.stringify(openAiShape({ ...reason, ...error }, statusCode)))
  return { node, statusCode, contentType: JSON_TYPE, body, headers, error, retryAfter: retryAfterOf(all['retry-after']) }
}

/** The failure that an error stands for which came with a good status, as an event or as the body. */
export function failureOf (node: AdapterNode, value: unknown, headers: UpstreamResponse['headers']): UpstreamFailure {
  const error = errorObject(value) ?? {}
  return failure(node, statusOf(error), error, headers)
}

function decoded (bytes: Buffer, encoding: string): Buffer | undefined {
  try {
    return decode(bytes, encoding, ERROR_LIMIT)
  } catch {
    return undefined
  }
}

/** Undefined for an encoding that is not known here. Throws for bytes that are not of it, or too many. */
export function decode (bytes: Buffer, encoding: string, maxOutputLength: number): Buffer | undefined {
  switch (encoding.toLowerCase()) {
    case 'identity': return bytes
    case 'gzip': case 'x-gzip': return gunzipSync(bytes, { maxOutputLength })
    case 'deflate': return inflateSync(bytes, { maxOutputLength })
    case 'br': return brotliDecompressSync(bytes, { maxOutputLength })
    default: return undefined
  }
}

/** A short text is a reason; a page is none. */
function textOf (bytes: Buffer | undefined, headers: UpstreamResponse['headers']): UpstreamErrorObject {
  const text = bytes?.toString('utf8').trim() ?? ''
  return text === '' || text.startsWith('<') || !/^(text\/plain|application\/json)\b/i.test(String(headers['content-type'] ?? 'text/plain')) || text.startsWith('{') ? {} : { message: text }
}

/**
 * 4xx that are not the client's fault. 401: the key a node gets is the gateway's. 408, 499: the node gave up on a
 * request that the gateway has not cancelled, as when the node shuts down.
 */
const NOT_THE_CLIENTS = new Set([401, 408, 499])
/** vLLM's engine process is gone, and the server that says so ends in a moment. */
const GOES_DOWN = /\bEngineCore\b|\bEngineDeadError\b/

/** The general rule: 429 and 503 are BUSY, other 4xx and 501 REJECTED, all else UNAVAILABLE. All have the answer. */
export function failureError (failure: UpstreamFailure, read?: FailureReader): AdapterError {
  const own = read?.(failure)
  if (own !== undefined) return own
  const { node, statusCode, contentType, body, headers, error, retryAfter } = failure
  const said = typeof error.message === 'string' ? error.message : ''
  const message = `${node.id} answered ${statusCode}${said === '' ? '' : `: ${said.slice(0, 500)}`}`
  const more = { node: node.id, retryAfter, response: { statusCode, contentType, body, headers } }
  if (statusCode >= 500 && GOES_DOWN.test(said)) return new AdapterError('UNAVAILABLE', message, { ...more, how: 'died' })
  if (statusCode === 429 || statusCode === 503) return new AdapterError('BUSY', message, more)
  if (statusCode === 501 || (statusCode >= 400 && statusCode < 500 && !NOT_THE_CLIENTS.has(statusCode))) return new AdapterError('REJECTED', message, more)
  return new AdapterError('UNAVAILABLE', message, more)
}
