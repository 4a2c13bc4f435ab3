import { ServerResponse } from 'node:http'
import { Readable } from 'node:stream'
import { isEventStream } from '../../adapters/http.ts'
import { flowOf, type Flow } from '../../adapters/flow.ts'
import type { UpstreamResponse } from '../../adapters/adapter.ts'
import type { TimeLimit } from '../../adapters/abort.ts'
import { clientError, epdError } from '../errors.ts'
import { writeChunk } from './chunk-writes.ts'
import { EventGate, KEEP_ALIVE } from './event-gate.ts'
import { UsageReader, type Closing } from './usage.ts'

/** Bytes that wait for a slow client before the node is paused. */
const READ_AHEAD = 64 * 1024

/** How an answer ended whose first bytes were on the way to the client. */
export interface Delivery {
  readonly outcome: 'complete' | 'upstream_failed' | 'client_gone'
  /** Why the node broke off. */
  readonly error?: Error | undefined
  /** `unread`: it had to wait for the client before, so that it, or a proxy before it, may have lost patience. */
  readonly how?: 'broken' | 'unread'
  readonly statusCode: number
  /** On the clock of `performance.now()`, in milliseconds. */
  readonly firstByteAt?: number | undefined
  /** Of the node's answer. */
  readonly bytes: number
  /** Searches the end of the answer for usage and finish reason, once: 10 us. */
  closing (): Closing
}

/** A node's answer whose first good bytes are there. */
export interface Answer {
  readonly statusCode: number
  readonly headers: UpstreamResponse['headers']
  /** A Buffer where the whole answer has come at once, as most short ones do. */
  readonly body: Readable | Buffer
  /** Resolves when the client's side has taken the last byte, when the node has broken off, or when the body is destroyed. Never rejects. */
  readonly delivered: Promise<Delivery>
}

/**
 * An answer on its way to the client, byte for byte and with back-pressure.
 *
 * Of an event stream only whole events pass. When the node breaks off after the first byte, an event stream ends with an
 * `error` event; any other body ends with an error of this stream. A node that sends nothing for `idle` milliseconds
 * counts as broken off; a client that reads slowly is not silence. A consumer that does not want the rest destroys it.
 */
export class AnswerStream extends Readable implements Answer {
  readonly statusCode: number
  readonly headers: UpstreamResponse['headers']
  readonly body = this
  readonly begun: Promise<void>
  readonly delivered: Promise<Delivery>
  readonly #upstream: Flow
  #paused = false
  /** It was paused once. That it has broken off meanwhile shows when it is read again. */
  #waited = false
  readonly #limit: TimeLimit
  readonly #idle: number
  readonly #gate: EventGate | undefined
  readonly #usage = new UsageReader()
  readonly #onAbort = (): void => { this.#abort(this.#limit.reason as Error) }
  #begin!: () => void
  #neverBegin!: (error: Error) => void
  #deliver!: (delivery: Delivery) => void
  #firstByteAt: number | undefined
  /** Its first event has some: it is to end with `[DONE]` or a finish reason. */
  #choices = false
  /** The node has nothing more to say. */
  #ended = false
  /** It has said all. */
  #whole = false
  #settled = false
  /** Nothing has come since the last beat. */
  #quiet = false
  #beat: NodeJS.Timeout | undefined
  /** The client's response, while it takes all at once. */
  #client: ServerResponse | undefined

  constructor (upstream: UpstreamResponse, limit: TimeLimit, idle: number, keepAlive: number) {
    super({ highWaterMark: READ_AHEAD })
    const { statusCode, headers } = upstream
    this.statusCode = statusCode
    this.headers = headers
    this.#upstream = flowOf(upstream)
    this.#limit = limit
    this.#idle = idle
    this.#gate = isEventStream(headers) ? new EventGate() : undefined
    if (this.#gate !== undefined && keepAlive > 0) this.#beat = setInterval(() => { this.#keepAlive() }, keepAlive)
    this.begun = new Promise((resolve, reject) => { this.#begin = resolve; this.#neverBegin = reject })
    this.delivered = new Promise(resolve => { this.#deliver = resolve })
    // Consumers learn of an error by `delivered`; one that does not listen must not end the process.
    this.on('error', () => {})
    if (limit.aborted) this.#onAbort()
    else limit.addEventListener('abort', this.#onAbort)
    this.#upstream.flow({
      data: chunk => { this.#take(chunk) },
      end: () => { this.#end() },
      // Of an abort this stream learns itself.
      error: error => { if (!limit.aborted) this.#fail(error) }
    })
  }

  override _read (): void {
    if (!this.#paused) return
    this.#paused = false
    this.#limit.restart(this.#idle)
    this.#upstream.resume()
  }

  /**
   * Events go straight into a client's response until that has to wait: the buffer of this stream takes 2 us of a token's 48
   * (40 processes each). Into anything else, such as a hook's compression, they go as from any stream.
   */
  override pipe<T extends NodeJS.WritableStream> (to: T, options?: { end?: boolean }): T {
    const coming = this.#gate !== undefined && !this.#ended && !this.#paused
    // The answer to HEAD has no body, whatever is written.
    if (!coming || this.readableFlowing !== null || options?.end === false || !(to instanceof ServerResponse) || to.req.method === 'HEAD') return super.pipe(to, options)
    const begun = this.read() as Buffer | null
    if (begun === null) return super.pipe(to, options)
    // It takes the head along.
    this.#written(to, to.write(begun))
    return to
  }

  override push (bytes: Buffer | null): boolean {
    const client = this.#client
    if (client === undefined) return super.push(bytes)
    // As long as nobody else reads along.
    if (bytes !== null && this.readableFlowing === null) {
      this.#written(client, writeChunk(client, bytes))
      return true
    }
    this.#client = undefined
    super.pipe(client)
    return super.push(bytes)
  }

  /** @param more - false: the client has to catch up, and is from then on like that of any stream */
  #written (client: ServerResponse, more: boolean): void {
    this.#client = more ? client : undefined
    if (more) return
    super.pipe(client)
    this.pause()
    client.once('drain', () => { this.resume() })
  }

  /** Silence in the middle of an answer is no end of it. */
  #keepAlive (): void {
    if (this.#quiet && !this.#ended && this.#firstByteAt !== undefined && this.#gate!.atBoundary && !this.#paused) this.push(KEEP_ALIVE)
    this.#quiet = true
  }

  #take (chunk: Buffer): void {
    this.#quiet = false
    this.#usage.add(chunk)
    const bytes = this.#gate === undefined ? chunk : this.#gate.pass(chunk)
    const more = bytes === undefined || this.push(bytes)
    if (bytes !== undefined && this.#firstByteAt === undefined) {
      this.#firstByteAt = performance.now()
      this.#choices = bytes.includes('"choices"')
      this.#begin()
    }
    if (!more) {
      this.#limit.clear()
      this.#waited = this.#paused = true
      this.#upstream.pause()
    } else if (this.#firstByteAt !== undefined) this.#limit.restart(this.#idle)
  }

  #end (): void {
    if (this.#ended) return
    if (this.#gate !== undefined && this.#firstByteAt !== undefined && !this.#usage.whole(this.#choices)) return this.#fail(new Error('the stream ended before its answer did'))
    this.#ended = this.#whole = true
    this.#limit.clear()
    const rest = this.#gate?.rest()
    if (rest !== undefined) this.push(rest)
    this.push(null)
    this.#begin()
  }

  #fail (error: Error): void {
    if (this.#ended) return
    // Its connection stays open, or breaks, when all has been said.
    if (this.#gate !== undefined && this.#usage.done) return this.#end()
    this.#ended = true
    // What a slow client has yet to read changes nothing.
    this.#settle('upstream_failed', error)
    if (this.#firstByteAt === undefined) {
      this.#neverBegin(error)
      this.destroy()
    } else if (this.#gate === undefined) this.destroy(error)
    else {
      this.#limit.clear()
      this.#upstream.close(null)
      this.push(this.#gate.errorEvent(clientError(epdError('EPD_ERR_UPSTREAM_BROKEN', [], { cause: error }))))
      this.push(null)
    }
  }

  #abort (reason: Error): void {
    // Also when the node is done, and only the client is slow.
    if (this.#ended) this.destroy(reason)
    else this.#fail(reason)
  }

  override _destroy (error: Error | null, callback: (error: Error | null) => void): void {
    this.#ended = true
    clearInterval(this.#beat)
    this.#limit.clear()
    this.#limit.removeEventListener('abort', this.#onAbort)
    this.#upstream.close(null)
    this.#settle(this.#whole && this.readableLength === 0 ? 'complete' : 'client_gone')
    callback(error)
  }

  #settle (outcome: Delivery['outcome'], error?: Error): void {
    if (this.#settled) return
    this.#settled = true
    this.#deliver({ outcome, error, how: this.#waited ? 'unread' : 'broken', statusCode: this.statusCode, firstByteAt: this.#firstByteAt, bytes: this.#usage.bytes, closing: () => this.#usage.read() })
  }
}
