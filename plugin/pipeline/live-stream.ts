import { Readable } from 'node:stream'
import { AdapterError, type UpstreamResponse } from '../../adapters/adapter.ts'
import { clientError } from '../errors.ts'
import type { Answer, Delivery } from './answer-stream.ts'

const HEADERS = { 'content-type': 'text/event-stream; charset=utf-8' }

/**
 * An event stream that begins before there is an answer, with what shows that someone works on it: comments and pings of
 * nodes, comments of the gateway. The answer follows, maybe another node's; or an `error` event, because a status has gone out.
 */
export class LiveStream extends Readable implements Answer {
  readonly statusCode = 200
  readonly headers: UpstreamResponse['headers']
  readonly delivered: Promise<Delivery>
  #deliver!: (delivery: Delivery) => void
  #answer: Answer | undefined
  #whole = false

  /** @param headers of the node whose sign of life is the first, if it is one's */
  constructor (headers: UpstreamResponse['headers'] = HEADERS) {
    super()
    this.headers = headers
    this.delivered = new Promise(resolve => { this.#deliver = resolve })
    this.on('error', () => {})
  }

  get body (): this {
    return this
  }

  /** A sign of life, for the client at once: one that has yet to read earlier ones needs no more. A copy, as the node's may be a slice of much. */
  show (bytes: Buffer): void {
    if (this.#answer === undefined && !this.destroyed && this.readableLength < this.readableHighWaterMark) this.push(Buffer.from(bytes))
  }

  /** The answer is there. */
  follow (answer: Answer): void {
    this.#answer = answer
    const { body } = answer
    if (this.destroyed) {
      if (body instanceof Readable) body.destroy()
    } else if (body instanceof Readable) {
      body.on('data', (chunk: Buffer) => { if (!this.push(chunk)) body.pause() })
      body.on('end', () => { this.#end() })
      body.on('error', (error: Error) => { this.destroy(error) })
    } else {
      // A server that does not stream.
      this.push(Buffer.concat([Buffer.from('data: '), body, Buffer.from('\n\ndata: [DONE]\n\n')]))
      this.#end()
    }
  }

  /** There will be no answer. */
  fail (error: unknown): void {
    this.push(`data: ${JSON.stringify({ error: errorOf(error) })}\n\n`)
    this.#end()
  }

  #end (): void {
    this.#whole = true
    this.push(null)
  }

  override _read (): void {
    if (this.#answer?.body instanceof Readable) this.#answer.body.resume()
  }

  override _destroy (error: Error | null, callback: (error: Error | null) => void): void {
    const none: Delivery = { outcome: this.#whole ? 'upstream_failed' : 'client_gone', statusCode: this.statusCode, bytes: 0, closing: () => ({ usage: undefined, finishReason: undefined }) }
    const complete = this.#whole && this.readableLength === 0
    if (!complete && this.#answer?.body instanceof Readable) this.#answer.body.destroy()
    if (this.#answer === undefined) this.#deliver(none)
    else this.#answer.delivered.then(delivery => { this.#deliver(complete || delivery.outcome === 'upstream_failed' ? delivery : { ...delivery, outcome: 'client_gone' }) }).catch(() => {})
    callback(error)
  }
}

/** What the client would have got with a status. */
function errorOf (error: unknown): unknown {
  if (!AdapterError.is(error) || error.response === undefined) return clientError(error)
  try {
    return (JSON.parse(error.response.body.toString()) as { error: unknown }).error
  } catch {
    return clientError(error)
  }
}
