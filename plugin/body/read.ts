import { IncomingMessage } from 'node:http'
import type { Readable } from 'node:stream'
import { epdError, isEpdError, type EpdError } from '../errors.ts'
import { FREE_FROM, freeFor, join } from './recycle.ts'

export interface ReadBodyOptions {
  /** Largest body taken, in bytes. */
  readonly limit: number
}

/** A request, or what a preParsing hook has put in its place: without headers it is of unknown length, and decoded. */
export type RequestLike = Readable & Partial<Pick<IncomingMessage, 'headers'>>

/**
 * Reads a request's body into one Buffer, preallocated when the client declares its length: peak memory is little more.
 *
 * @throws EPD_ERR_BODY_TOO_LARGE, EPD_ERR_CONTENT_ENCODING, EPD_ERR_CLIENT_CLOSED_REQUEST. The request is left unread
 * then: the answer should carry `connection: close`.
 */
export function readBody (request: RequestLike, options: ReadBodyOptions): Promise<Buffer> {
  const { headers = {} } = request
  const encoding = headers['content-encoding']
  if (encoding !== undefined && encoding !== '' && encoding.toLowerCase() !== 'identity') {
    return Promise.reject(epdError('EPD_ERR_CONTENT_ENCODING'))
  }
  const length = declaredLength(headers)
  if (length !== undefined && length > options.limit) return Promise.reject(tooLarge(options.limit))
  if (request.destroyed || request.readableEnded) return Promise.reject(closed())
  return length === undefined ? readChunked(request, options.limit) : readKnown(request, length)
}

function declaredLength (headers: IncomingMessage['headers']): number | undefined {
  if (headers['transfer-encoding'] !== undefined) return undefined
  const text = headers['content-length']
  if (text === undefined) return undefined
  const length = Number(text)
  return Number.isSafeInteger(length) && length >= 0 ? length : undefined
}

function readKnown (request: RequestLike, length: number): Promise<Buffer> {
  let body: Buffer | undefined
  let filled = 0
  const free = length >= FREE_FROM ? freeFor(request) : undefined
  return consume(request, chunk => {
    // Node holds clients to their content-length; a stream put in front of the request may not.
    if (filled + chunk.length > length) throw epdError('EPD_ERR_INVALID_JSON', ['The request body is longer than its content-length'])
    // Most bodies come in one chunk, which is the body then.
    if (chunk.length === length) body = chunk
    else {
      body ??= Buffer.allocUnsafeSlow(length)
      chunk.copy(body, filled)
    }
    filled += chunk.length
    // A chunk that was given back has no length any more.
    if (chunk !== body) free?.(chunk)
  }, () => {
    if (filled !== length) throw closed()
    return body ?? Buffer.alloc(0)
  })
}

async function readChunked (request: RequestLike, limit: number): Promise<Buffer> {
  const chunks: Buffer[] = []
  const free = freeFor(request)
  let length = 0
  await consume(request, chunk => {
    length += chunk.length
    if (length > limit) throw tooLarge(limit)
    chunks.push(chunk)
  }, () => {})
  return await join(chunks, length, length >= FREE_FROM ? free : undefined)
}

/** Keeps its listeners: they cost nothing once settled, and late errors must not become uncaught ones. */
function consume<T> (request: RequestLike, take: (chunk: Buffer) => void, finish: () => T): Promise<T> {
  return new Promise((resolve, reject) => {
    let settled = false
    const fail = (error: unknown): void => {
      settled = true
      request.pause()
      reject(error)
    }
    request.on('data', (chunk: Buffer | string) => {
      if (settled) return
      try {
        take(typeof chunk === 'string' ? Buffer.from(chunk) : chunk)
      } catch (error) {
        fail(error)
      }
    })
    request.on('end', () => {
      if (settled) return
      settled = true
      try {
        resolve(finish())
      } catch (error) {
        reject(error)
      }
    })
    request.on('error', (error: Error) => { if (!settled) fail(request instanceof IncomingMessage ? closed(error) : unreadable(error)) })
    request.on('close', () => { if (!settled) fail(closed()) })
  })
}

function tooLarge (limit: number): EpdError {
  return epdError('EPD_ERR_BODY_TOO_LARGE', [limit])
}

function unreadable (cause: unknown): EpdError {
  return isEpdError(cause) ? cause : epdError('EPD_ERR_INVALID_ENCODING', [], { cause })
}

function closed (cause?: unknown): EpdError {
  return epdError('EPD_ERR_CLIENT_CLOSED_REQUEST', [], { cause })
}
