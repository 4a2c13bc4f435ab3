import { Readable } from 'node:stream'
import type { FastifyReply } from 'fastify'
import type { UpstreamResponse } from '../adapters/adapter.ts'
import { clientError, epdError } from './errors.ts'
import type { Delivery } from './pipeline/index.ts'
import { ClientGoneError, onClosed, relay, type RelayOptions } from './relay/index.ts'

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
    const type = upstream.headers['content-type']
    reply.code(upstream.statusCode).headers({ ...options.headers, ...(type === undefined ? {} : { 'content-type': type }) }).send(carrier)
  })
}

/** A stream that Fastify can send. What it pipes is not its own: it lets the relay write to the response directly. */
class Carrier extends Readable {
  readonly #upstream: UpstreamResponse
  readonly #reply: FastifyReply
  readonly #options: RelayOptions
  readonly #resolve: (delivery: Delivery) => void
  readonly #reject: (error: unknown) => void
  #started = false
  #resume: (() => void) | undefined

  constructor (upstream: UpstreamResponse, reply: FastifyReply, options: RelayOptions, resolve: (delivery: Delivery) => void, reject: (error: unknown) => void) {
    super()
    this.#upstream = upstream
    this.#reply = reply
    this.#options = options
    this.#resolve = resolve
    this.#reject = reject
  }

  override pipe<T extends NodeJS.WritableStream> (destination: T, options?: { end?: boolean }): T {
    const { raw } = this.#reply
    if (destination as unknown !== raw) {
      // A hook has put a transform in between, such as compression.
      this.#started = true
      this.#pull()
      return super.pipe(destination, options)
    }
    this.#started = true
    relay(this.#upstream, raw, this.#options).then(this.#resolve, err => { this.#failed(err) })
    // To Fastify the stream is over: a stream that ends after its response would be taken for an accident.
    this.push(null)
    this.resume()
    return destination
  }

  override _read (): void {
    const resume = this.#resume
    this.#resume = undefined
    resume?.()
  }

  /** The response is closed. A hook may have failed, so that nothing was ever piped. */
  abandon (): void {
    if (this.#started) return
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
    const { statusCode } = this.#upstream
    this.#upstream.pipe({
      write: chunk => this.push(chunk),
      onDrain: resume => { this.#resume = resume }
    }).then(() => {
      this.push(null)
      this.#resolve({ outcome: 'complete', statusCode })
    }, (error: Error) => {
      this.destroy(error)
      this.#resolve({ outcome: 'upstream_failed', error, statusCode })
    })
    this.once('close', () => { if (!this.readableEnded) this.#upstream.destroy(new ClientGoneError()) })
  }
}
