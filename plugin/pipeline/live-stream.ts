import { Readable } from 'node:stream'
import { AdapterError, type UpstreamResponse } from '../../adapters/adapter.ts'
import { isEventStream } from '../../adapters/http.ts'
import { clientError, epdError } from '../errors.ts'
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
    const { body, headers } = answer
    const streams = isEventStream(headers)
    if (!streams && !/\bjson\b/i.test(String(headers['content-type']))) {
      if (body instanceof Readable) body.destroy()
      this.fail(epdError('EPD_ERR_UPSTREAM_FAILED', [], { cause: new Error(`an event stream has begun, and the answer is ${String(headers['content-type'])}`) }))
      return
    }
    this.#answer = answer
    // A server that does not stream: its answer is one event.
    const [before, after] = streams ? ['', ''] : ['data: ', '\n\ndata: [DONE]\n\n']
    const end = (): void => {
      this.push(after)
      this.#end()
    }
    if (this.destroyed) {
      if (body instanceof Readable) body.destroy()
    } else if (body instanceof Readable) {
      this.push(before)
      body.on('data', (chunk: Buffer) => { if (!this.push(streams ? chunk : onOneLine(chunk))) body.pause() })
      body.on('end', end)
      body.on('error', (error: Error) => { this.destroy(error) })
    } else {
      this.push(before)
      this.push(onOneLine(body))
      end()
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
    const none: Delivery = { outcome: this.#whole ? 'upstream_failed' : 'client_gone', how: 'unread', statusCode: this.statusCode, bytes: 0, closing: () => ({ usage: undefined, finishReason: undefined }) }
    const complete = this.#whole && this.readableLength === 0
    if (!complete && this.#answer?.body instanceof Readable) this.#answer.body.destroy()
    if (this.#answer === undefined) this.#deliver(none)
    else this.#answer.delivered.then(delivery => { this.#deliver(complete || delivery.outcome === 'upstream_failed' ? delivery : { ...delivery, outcome: 'client_gone' }) }).catch(() => {})
    callback(error)
  }
}

/** Of JSON: a line break in it is space between two tokens, and would end the field of an event. */
function onOneLine (bytes: Buffer): Buffer {
  return Buffer.from(bytes.toString('latin1').replace(/[\r\n]/g, ' '), 'latin1')
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
