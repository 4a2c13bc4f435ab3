import type { Dispatcher } from 'undici'
import type { AdapterNode, ByteSink, CallEnd, UpstreamResponse } from '../adapter.ts'
import { brokenOff, timedOut, unavailable } from './failures.ts'

/** Bytes kept for a reader that has not come yet, before the upstream is paused. */
export const READ_AHEAD = 64 * 1024

const DONE = Promise.resolve()

type Headers = Record<string, string | string[]>
type Controller = Dispatcher.DispatchController

interface Collected {
  readonly body: Buffer
  /** False when the body was longer than the limit and was cut. */
  readonly complete: boolean
}

/**
 * One HTTP exchange: undici's handler and the response given to the core in one object, as every request makes one.
 * The head comes first; body bytes that arrive before somebody reads are kept, up to {@link READ_AHEAD}, then the socket is paused.
 */
export class Exchange implements UpstreamResponse, Dispatcher.DispatchHandler {
  statusCode = 0
  headers: Headers = {}
  /** Resolves when the status and headers are there. */
  readonly head: Promise<this>

  readonly #node: AdapterNode
  readonly #signal: CallEnd
  readonly #onAbort = (): void => { this.#fail(this.#signal.reason, true) }
  #timer: NodeJS.Timeout | undefined
  #controller: Controller | undefined
  #headDone!: (value: this) => void
  #headFailed!: (error: unknown) => void
  #queue: Buffer[] = []
  #queued = 0
  #readAhead = READ_AHEAD
  #ended = false
  #failed = false
  #error: unknown
  #blocked = false
  #taken = false
  #sink: ByteSink | undefined
  #wake: (() => void) | undefined

  /** @param timeout - milliseconds for the whole exchange; 0 for none. */
  constructor (node: AdapterNode, signal: CallEnd, timeout: number) {
    this.#node = node
    this.#signal = signal
    this.head = new Promise((resolve, reject) => {
      this.#headDone = resolve
      this.#headFailed = reject
    })
    if (signal.aborted) this.#onAbort()
    else signal.addEventListener('abort', this.#onAbort)
    if (timeout > 0) this.#timer = setTimeout(() => { this.#fail(timedOut(node, timeout), true) }, timeout).unref()
  }

  onRequestStart (controller: Controller): void {
    this.#controller = controller
    if (this.#failed) controller.abort(asError(this.#error))
  }

  onResponseStart (_controller: Controller, statusCode: number, headers: Headers): void {
    if (statusCode < 200) return
    this.statusCode = statusCode
    this.headers = headers
    this.#headDone(this)
  }

  onResponseData (controller: Controller, chunk: Buffer): void {
    // undici hands out an empty chunk when it resumes with nothing read.
    if (chunk.length === 0) return
    if (this.#sink !== undefined && !this.#blocked && this.#queue.length === 0) {
      this.#write(this.#sink, chunk)
      return
    }
    this.#queue.push(chunk)
    this.#queued += chunk.length
    if (this.#queued > this.#readAhead) controller.pause()
    this.#wake?.()
  }

  onResponseEnd (): void {
    this.#ended = true
    this.#stopTimer()
    this.#settle()
    this.#wake?.()
  }

  onResponseError (_controller: Controller, error: Error): void {
    this.#fail(this.statusCode === 0 ? unavailable(this.#node, error) : brokenOff(this.#node, error), false)
  }

  /** Waits for body bytes that were not there yet; false when the body has ended without more. Rejects when it broke off. */
  async more (): Promise<boolean> {
    const before = this.#queued
    while (this.#queued === before && !this.#ended) {
      if (this.#failed) throw this.#error
      await this.#news()
    }
    if (this.#failed) throw this.#error
    return this.#queued > before
  }

  get hasBytes (): boolean {
    return this.#queued > 0
  }

  /** The body bytes that are there, without taking them. */
  peek (): Buffer {
    return this.#queue.length === 1 ? this.#queue[0]! : Buffer.concat(this.#queue)
  }

  pipe (sink: ByteSink): Promise<void> {
    if (!this.#ended || this.#failed || this.#taken) return this.#pipe(sink)
    // A short answer has come whole with its head.
    this.#taken = true
    this.#sink = sink
    this.#flush(sink)
    return this.#queue.length === 0 ? DONE : this.#drain(sink)
  }

  async #pipe (sink: ByteSink): Promise<void> {
    this.#take()
    this.#sink = sink
    await this.#drain(sink)
  }

  async #drain (sink: ByteSink): Promise<void> {
    for (;;) {
      if (this.#failed) throw this.#error
      // Asked for before the socket is resumed, as resuming may bring news at once.
      const news = this.#news()
      this.#flush(sink)
      if (this.#over) return
      await news
    }
  }

  async buffer (limit: number): Promise<Buffer> {
    const { body, complete } = await this.collect(limit)
    if (complete) return body
    throw brokenOff(this.#node, new Error(`the answer is longer than ${limit} bytes`))
  }

  /** As `buffer`, but cuts a body that is too long instead of failing. */
  async collect (limit: number): Promise<Collected> {
    this.#take()
    this.#readAhead = limit
    while (!this.#ended && this.#queued <= limit) {
      if (this.#failed) throw this.#error
      const news = this.#news()
      this.#controller?.resume()
      await news
    }
    if (this.#failed) throw this.#error
    const body = this.peek()
    this.#queue = []
    this.#settle()
    if (body.length <= limit) return { body, complete: true }
    this.destroy()
    return { body: body.subarray(0, limit), complete: false }
  }

  destroy (reason?: Error): void {
    this.#fail(reason ?? new Error('the answer is not wanted'), true)
  }

  #take (): void {
    if (this.#taken) throw new Error('the body of this answer has already been taken')
    this.#taken = true
  }

  #news (): Promise<void> {
    return new Promise(resolve => {
      this.#wake = () => { this.#wake = undefined; resolve() }
    })
  }

  #write (sink: ByteSink, chunk: Buffer): void {
    if (sink.write(chunk)) return
    this.#blocked = true
    this.#controller?.pause()
    sink.onDrain(() => {
      this.#blocked = false
      this.#flush(sink)
      this.#wake?.()
    })
  }

  #flush (sink: ByteSink): void {
    while (this.#queue.length > 0 && !this.#blocked && !this.#failed) {
      const chunk = this.#queue.shift()!
      this.#queued -= chunk.length
      this.#write(sink, chunk)
    }
    this.#settle()
    if (!this.#blocked) this.#controller?.resume()
  }

  #fail (error: unknown, abort: boolean): void {
    if (this.#failed || this.#over) return
    this.#failed = true
    this.#error = error
    this.#stopTimer()
    this.#signal.removeEventListener('abort', this.#onAbort)
    this.#headFailed(error)
    if (abort && !this.#ended) this.#controller?.abort(asError(error))
    this.#wake?.()
  }

  /** Nothing is left to come or to hand on. An answer read to its end may yet wait for a reader who has left. */
  get #over (): boolean {
    return this.#ended && this.#queue.length === 0
  }

  #settle (): void {
    if (this.#over) this.#signal.removeEventListener('abort', this.#onAbort)
  }

  #stopTimer (): void {
    if (this.#timer !== undefined) clearTimeout(this.#timer)
  }
}

function asError (value: unknown): Error {
  return value instanceof Error ? value : new Error(String(value))
}
