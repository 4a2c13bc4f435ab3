import { IncomingMessage } from 'node:http'
import { Socket } from 'node:net'
import type { Readable } from 'node:stream'
import { MessageChannel } from 'node:worker_threads'
import { epdError, type EpdError } from '../errors.ts'
import { Pace } from './pace.ts'

/** Chunks of smaller bodies are left to the garbage collector: freeing them would cost more than it gives, in bytes. */
const RECYCLE_FROM = 4 << 20
/** How much of a chunked body is joined between two looks at the clock, in bytes. */
const JOIN_BYTES = 1 << 20
/** How much memory is collected before it is freed, in bytes. */
const RECYCLE_BATCH = 256 * 1024

export interface ReadBodyOptions {
  /** Largest body taken, in bytes. */
  readonly limit: number
}

/** A request, or what a preParsing hook has put in its place: without headers it is of unknown length, and decoded. */
export type RequestLike = Readable & Partial<Pick<IncomingMessage, 'headers'>>

/**
 * Reads a request's body into one Buffer: preallocated when the client declares its length, else joined at
 * the end. Peak memory is the body's size and little more.
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
  const recycler = length >= RECYCLE_FROM ? recyclerFor(request) : undefined
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
    if (chunk !== body) recycler?.add(chunk)
  }, () => {
    recycler?.flush()
    if (filled !== length) throw closed()
    return body ?? Buffer.alloc(0)
  })
}

async function readChunked (request: RequestLike, limit: number): Promise<Buffer> {
  const chunks: Buffer[] = []
  let length = 0
  await consume(request, chunk => {
    length += chunk.length
    if (length > limit) throw tooLarge(limit)
    chunks.push(chunk)
  }, () => {})
  return await join(chunks, length, length >= RECYCLE_FROM ? recyclerFor(request) : undefined)
}

/** Chunks are freed as they are copied, so that both never exist in full. */
async function join (chunks: Buffer[], length: number, recycler: Recycler | undefined): Promise<Buffer> {
  const body = Buffer.allocUnsafeSlow(length)
  const pace = new Pace()
  let filled = 0
  let rested = 0
  for (const chunk of chunks) {
    chunk.copy(body, filled)
    filled += chunk.length
    recycler?.add(chunk)
    if (filled - rested >= JOIN_BYTES && pace.due()) {
      rested = filled
      await pace.rest()
    }
  }
  recycler?.flush()
  return body
}

/** Chunks can be freed only when they come straight from a socket and have no other listener. */
function recyclerFor (request: RequestLike): Recycler | undefined {
  const direct = request instanceof IncomingMessage && request.socket instanceof Socket && request.listenerCount('data') <= 1
  return direct ? new Recycler() : undefined
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
  return epdError('EPD_ERR_INVALID_ENCODING', [], { cause })
}

function closed (cause?: unknown): EpdError {
  return epdError('EPD_ERR_CLIENT_CLOSED_REQUEST', [], { cause })
}

/**
 * Frees the memory of copied chunks at once.
 *
 * Chunks lie outside of the JavaScript heap, where garbage collection comes late: a 10 MB body would cost 20 MB. Moving
 * buffers to a port and closing it frees them in all supported versions of Node (`ArrayBuffer.prototype.transfer` came with 22).
 */
class Recycler {
  #batch: ArrayBuffer[] = []
  #bytes = 0

  /** Frees the chunk's memory soon. No other view of it may exist. */
  add (chunk: Buffer): void {
    const { buffer } = chunk
    // A slice of a larger buffer belongs to others too.
    if (!(buffer instanceof ArrayBuffer) || chunk.byteLength !== buffer.byteLength || chunk.byteLength === 0) return
    this.#batch.push(buffer)
    this.#bytes += chunk.byteLength
    if (this.#bytes >= RECYCLE_BATCH) this.flush()
  }

  flush (): void {
    if (this.#batch.length === 0) return
    const { port1, port2 } = new MessageChannel()
    port1.postMessage(null, this.#batch)
    port2.close()
    this.#batch = []
    this.#bytes = 0
  }
}
