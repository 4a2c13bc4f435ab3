import { Readable, type Writable } from 'node:stream'
import type { FastifyReply } from 'fastify'
import type { UpstreamResponse } from '../../adapters/adapter.ts'
import { clientError, epdError } from '../errors.ts'
import type { Delivery } from '../pipeline/index.ts'
import { answerHeaders, ClientGoneError, errorEvent, EventGate, isEventStream, onClosed, relay, Tail, type RelayOptions } from './relay/index.ts'

const describeError: NonNullable<RelayOptions['describeError']> = error => clientError(epdError('EPD_ERR_UPSTREAM_BROKEN', [], { cause: error }))

/**
 * Hands an answer to the client: straight to the socket, unless the route has onSend hooks, which a hijacked reply would
 * leave out (@fastify/otel ends its span there). Those get a stream to send, as from any handler.
 */
export function deliver (upstream: UpstreamResponse, reply: FastifyReply, headers: Record<string, string>): Promise<Delivery> {
  const options = { headers, describeError }
  return hasOnSend(reply) ? throughHooks(upstream, reply, options) : relay(upstream, reply, options)
}

const CONTEXT = 'Symbol(fastify.context)'
let kContext: symbol | undefined

/** No public API tells; where the private one has changed, the way that is always right is taken. */
function hasOnSend (reply: FastifyReply): boolean {
  const request = reply.request as unknown as Record<symbol, { onSend?: unknown } | undefined>
  kContext ??= Object.getOwnPropertySymbols(request).find(symbol => symbol.toString() === CONTEXT)
  const context = kContext === undefined ? undefined : request[kContext]
  return context === undefined || context.onSend !== null
}

function throughHooks (upstream: UpstreamResponse, reply: FastifyReply, options: RelayOptions): Promise<Delivery> {
  return new Promise((resolve, reject) => {
    const carrier = new Carrier(upstream, reply, options, resolve, reject)
    onClosed(reply.raw, () => { carrier.abandon() })
    const headers = answerHeaders(upstream.headers, {}, options.headers)
    // A hook may make another body of it.
    delete headers['content-length']
    for (const name in headers) {
      const taken = reply.hasHeader(name) && name !== 'content-type' && options.headers?.[name] === undefined
      if (!taken) reply.header(name, headers[name])
    }
    reply.code(upstream.statusCode).send(carrier)
  })
}

/**
 * A stream that Fastify can send. What it pipes is not its own: it lets the relay write to the response directly. Where a
 * hook has put something in between, such as compression, it is a stream like any other.
 */
class Carrier extends Readable {
  readonly #upstream: UpstreamResponse
  readonly #reply: FastifyReply
  readonly #options: RelayOptions
  readonly #resolve: (delivery: Delivery) => void
  readonly #reject: (error: unknown) => void
  readonly #tail = new Tail()
  readonly #gate: EventGate | undefined
  #destinations: NodeJS.WritableStream[] = []
  #way: 'unread' | 'relayed' | 'read' = 'unread'
  #resume: (() => void) | undefined
  #firstByteAt: number | undefined

  constructor (upstream: UpstreamResponse, reply: FastifyReply, options: RelayOptions, resolve: (delivery: Delivery) => void, reject: (error: unknown) => void) {
    super()
    this.#upstream = upstream
    this.#reply = reply
    this.#options = options
    this.#resolve = resolve
    this.#reject = reject
    this.#gate = isEventStream(upstream.headers) ? new EventGate() : undefined
    // A hook that pipes it on may not listen, and an error nobody hears would end the process.
    this.on('error', () => {})
  }

  override pipe<T extends NodeJS.WritableStream> (destination: T, options?: { end?: boolean }): T {
    const { raw } = this.#reply
    if (destination as unknown !== raw || this.#way === 'read') {
      this.#destinations.push(destination)
      return super.pipe(destination, options)
    }
    this.#way = 'relayed'
    relay(this.#upstream, raw, this.#options).then(this.#resolve, err => { this.#failed(err) })
    // To Fastify the stream is over: a stream that ends after its response would be taken for an accident.
    this.push(null)
    this.resume()
    return destination
  }

  override _read (): void {
    if (this.#way === 'unread') {
      this.#way = 'read'
      this.#pull()
      return
    }
    const resume = this.#resume
    this.#resume = undefined
    resume?.()
  }

  /** The response is closed. A hook may have failed, so that nothing was ever read. */
  abandon (): void {
    if (this.#way === 'read') this.destroy()
    if (this.#way !== 'unread') return
    this.#upstream.destroy(new ClientGoneError())
    this.#resolve({ outcome: 'client_gone', statusCode: this.#reply.statusCode })
  }

  /** Fastify has taken the reply already, so an error answer can't be sent any more by its means. */
  #failed (err: unknown): void {
    const { raw } = this.#reply
    if (err instanceof ClientGoneError || raw.destroyed || raw.headersSent) { this.#reject(err); return }
    const body = JSON.stringify({ error: describeError(err as Error) })
    raw.writeHead(502, { 'content-type': 'application/json; charset=utf-8', 'content-length': Buffer.byteLength(body) }).end(body)
    this.#resolve({ outcome: 'upstream_failed', error: err as Error, statusCode: 502 })
  }

  #pull (): void {
    this.once('close', () => { if (!this.readableEnded) this.#upstream.destroy(new ClientGoneError()) })
    this.#upstream.pipe({
      write: chunk => this.#take(chunk),
      onDrain: resume => { this.#resume = resume }
    }).then(() => {
      const rest = this.#gate?.rest()
      if (rest !== undefined) this.push(rest)
      this.push(null)
      this.#settle('complete')
    }, (error: Error) => {
      if (error instanceof ClientGoneError) return this.#settle('client_gone')
      this.#breakOff(error)
      this.#settle('upstream_failed', error)
    })
  }

  #take (chunk: Buffer): boolean {
    this.#firstByteAt ??= performance.now()
    this.#tail.add(chunk)
    const bytes = this.#gate === undefined ? chunk : this.#gate.pass(chunk)
    return bytes === undefined || this.push(bytes)
  }

  /** As the relay does: an event into a stream of events, else the connection is cut. */
  #breakOff (error: Error): void {
    if (this.#gate !== undefined) {
      this.push(errorEvent(describeError(error), this.#gate))
      this.push(null)
      return
    }
    this.destroy(error)
    // One that is only piped to is never told.
    for (const destination of this.#destinations) if ('destroy' in destination) (destination as Writable).destroy()
    if (this.#reply.raw.headersSent) this.#reply.raw.destroy()
  }

  #settle (outcome: Delivery['outcome'], error?: Error): void {
    this.#resolve({ ...this.#tail.read(), outcome, error, statusCode: this.#upstream.statusCode, firstByteAt: this.#firstByteAt })
  }
}
