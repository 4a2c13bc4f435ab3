import type { OutgoingHttpHeaders, ServerResponse } from 'node:http'
import type { FastifyReply } from 'fastify'
import type { ByteSink, UpstreamResponse } from '../../../adapters/adapter.ts'
import { ClientGoneError, rawOf } from './client-gone.ts'
import { isClosed, offClosed, onClosed } from './closed.ts'
import { errorEvent, EventGate, type StreamError } from './events.ts'
import { answerHeaders, isEventStream, knownLength } from './headers.ts'
import { Tail } from './tail.ts'
import type { Closing, Usage } from './tail.ts'
import { endWith, writerFor } from './writer.ts'
import type { BodyWriter } from './writer.ts'

export interface RelayOptions {
  /** Response headers beside the upstream's and the reply's: `x-epd-*`. */
  readonly headers?: Readonly<Record<string, string>> | undefined
  /** Called once, as the first byte goes to the client. */
  readonly onFirstByte?: (() => void) | undefined
  /** Ends the relay: before the first byte it rejects with the signal's reason, after it the stream breaks off. */
  readonly signal?: AbortSignal | undefined
  /** The error event for a stream that broke off. */
  readonly describeError?: ((error: Error) => StreamError) | undefined
}

export interface RelayResult {
  readonly outcome: 'complete' | 'upstream_failed' | 'client_gone'
  readonly statusCode: number
  readonly eventStream: boolean
  /** Body bytes taken from the upstream. */
  readonly bytes: number
  readonly chunks: number
  /** Times by `performance.now()`, in milliseconds. */
  readonly startedAt: number
  readonly firstByteAt: number
  readonly endedAt: number
  /** Why the upstream broke off. */
  readonly error?: Error | undefined
  /** Read from the end of the answer when first asked for. */
  readonly usage: Usage | undefined
  readonly finishReason: string | undefined
}

/**
 * Passes an upstream's answer on to the client, byte for byte and with back-pressure.
 *
 * Nothing is written before the upstream's first body byte, or its end. Until then a failure rejects and the reply is
 * untouched, so that the caller can try again or answer with an error; afterwards the promise always resolves, and a
 * break-off reaches the client as an `error` event (event streams) or a closed connection (anything else). When the
 * client leaves, the upstream is destroyed at once.
 *
 * @throws what the upstream's `pipe` throws, `signal.reason`, or ClientGoneError: all before the first byte only.
 */
export function relay (
  upstream: UpstreamResponse, reply: FastifyReply | ServerResponse, options: RelayOptions = NO_OPTIONS
): Promise<RelayResult> {
  return new Relay(upstream, reply, options).run()
}

const NO_OPTIONS: RelayOptions = {}

function describe (error: Error): StreamError {
  return { message: 'The model server broke off the answer', type: 'server_error', code: error.name === 'TimeoutError' ? 'timeout' : 'upstream_failed', param: null }
}

/** One answer on its way; becomes the result when it has arrived, as every request makes one. */
class Relay implements ByteSink, RelayResult {
  readonly #upstream: UpstreamResponse
  readonly #reply: FastifyReply | ServerResponse
  readonly #response: ServerResponse
  readonly #options: RelayOptions
  readonly #tail = new Tail()
  readonly #gate: EventGate | undefined
  #writer: BodyWriter | undefined
  #gone = false
  #closing: Closing | undefined

  readonly statusCode: number
  readonly eventStream: boolean
  readonly startedAt = performance.now()
  firstByteAt = 0
  endedAt = 0
  bytes = 0
  chunks = 0
  outcome: RelayResult['outcome'] = 'complete'
  error: Error | undefined

  constructor (upstream: UpstreamResponse, reply: FastifyReply | ServerResponse, options: RelayOptions) {
    this.#upstream = upstream
    this.#reply = reply
    this.#response = rawOf(reply)
    this.#options = options
    this.statusCode = upstream.statusCode
    this.eventStream = isEventStream(upstream.headers)
    this.#gate = this.eventStream ? new EventGate() : undefined
  }

  get usage (): Usage | undefined {
    this.#closing ??= this.#tail.read()
    return this.#closing.usage
  }

  get finishReason (): string | undefined {
    this.#closing ??= this.#tail.read()
    return this.#closing.finishReason
  }

  async run (): Promise<RelayResult> {
    const { signal } = this.#options
    const response = this.#response
    // Errors of the connection are told by 'close'; unheard they would end the process.
    response.on('error', ignore)
    onClosed(response, this.#onClose)
    signal?.addEventListener('abort', this.#onAbort)
    if (isClosed(response)) this.#onClose()
    if (signal?.aborted === true) this.#onAbort()
    try {
      await this.#upstream.pipe(this)
      this.#settle(undefined)
    } catch (reason) {
      // It does not know yet when it was this end that failed.
      this.#upstream.destroy(asError(reason))
      this.#settle(asError(reason))
    } finally {
      offClosed(response, this.#onClose)
      signal?.removeEventListener('abort', this.#onAbort)
    }
    this.endedAt = performance.now()
    return this
  }

  readonly #onClose = (): void => {
    if (this.#response.writableFinished) return
    this.#gone = true
    this.#upstream.destroy(new ClientGoneError())
  }

  readonly #onAbort = (): void => { this.#upstream.destroy(asError(this.#options.signal?.reason)) }

  /** The upstream has come to its end, one way or another. Throws only while the reply is untouched. */
  #settle (error: Error | undefined): void {
    if (this.firstByteAt === 0 && (error !== undefined || this.#gone)) {
      const { signal } = this.#options
      throw this.#gone ? new ClientGoneError() : signal?.aborted === true ? signal.reason : error
    }
    if (this.#gone) this.outcome = 'client_gone'
    else if (error === undefined) this.#end()
    else {
      this.outcome = 'upstream_failed'
      this.error = error
      this.#breakOff(error)
    }
  }

  write (chunk: Buffer): boolean {
    if (this.#gone) return true
    this.bytes += chunk.length
    this.chunks++
    this.#tail.add(chunk)
    if (this.#writer !== undefined) return this.#pass(this.#writer, chunk)
    return this.#first(chunk)
  }

  onDrain (resume: () => void): void {
    this.#writer!.onDrain(resume)
  }

  #first (chunk: Buffer): boolean {
    const response = this.#response
    const length = this.#begin()
    // A whole answer in one chunk goes out in one write.
    if (length === chunk.length) {
      endWith(response, chunk)
      return true
    }
    const bytes = this.#gate === undefined ? chunk : this.#gate.pass(chunk)
    if (bytes === undefined) response.flushHeaders()
    const more = bytes === undefined || response.write(bytes)
    this.#writer = writerFor(response)
    return more
  }

  #pass (writer: BodyWriter, chunk: Buffer): boolean {
    if (this.#gate === undefined) return writer.write(chunk)
    const whole = this.#gate.pass(chunk)
    return whole === undefined || writer.write(whole)
  }

  /** Makes the head; from here on the reply is ours. Returns the length of the body, if that is known. */
  #begin (): number | undefined {
    const reply = this.#reply
    const headers = answerHeaders(this.#upstream.headers, reply.getHeaders() as OutgoingHttpHeaders, this.#options.headers)
    // Throws for what is no header. The reply is then still the caller's.
    this.#response.writeHead(this.#upstream.statusCode, headers)
    if ('hijack' in reply) reply.hijack()
    this.firstByteAt = performance.now()
    this.#options.onFirstByte?.()
    return knownLength(headers)
  }

  #end (): void {
    if (this.firstByteAt === 0) this.#begin()
    if (this.#response.writableEnded) return
    const rest = this.#gate?.rest()
    if (rest !== undefined) this.#writer?.write(rest)
    this.#response.end()
  }

  /** After the first byte an error can only go into the stream (event streams), or be told by closing the connection. */
  #breakOff (error: Error): void {
    const response = this.#response
    if (response.writableEnded) return
    if (this.#gate === undefined) {
      response.destroy()
      return
    }
    this.#writer!.write(errorEvent((this.#options.describeError ?? describe)(error), this.#gate))
    response.end()
  }
}

function ignore (): void {}

function asError (value: unknown): Error {
  return value instanceof Error ? value : new Error(String(value))
}
