import { AdapterError, type Call, type Log, type UpstreamResponse } from '../../adapters/adapter.ts'
import { abortable, TimeLimit } from '../../adapters/abort.ts'
import { REQUEST_ID_HEADER } from '../../adapters/wire/headers.ts'
import { epdError } from '../errors.ts'
import type { Plan, SingleNode } from '../planning/index.ts'
import { ATTR } from '../../adapters/wire/semconv.ts'
import { startRequest, type RequestTrace, type StageSpan } from '../telemetry/spans.ts'
import type { Pass } from './admission.ts'
import { KEEP_ALIVE } from './event-gate.ts'
import { Leases } from './leases.ts'
import { LiveStream } from './live-stream.ts'
import { adaptersError } from './inquest.ts'
import type { Cancellable } from './in-flight.ts'
import type { Timing } from './timing.ts'
import type { Core, GatewayRequest } from './types.ts'

const OPERATIONS: Readonly<Record<string, string>> = { '/v1/completions': 'text_completion', '/v1/embeddings': 'embeddings' }
/** How long a call may take that the request does not wait for: ending leases, aborting a request on a node, telling a node of it. */
const ASIDE_MS = 5_000
/** Timers of Node.js fire up to a millisecond early. */
const TIMER_SLACK_MS = 2

/**
 * One request from arrival to its end: everything it holds, so that there is one place where it is given back. Whatever
 * the way out, `close` is the only exit: signals abort, leases without ACK are released, the admission pass returns.
 */
export class Exchange implements Cancellable {
  readonly core: Core
  readonly trace: RequestTrace
  /** The request's own, with the trace id on every line. */
  readonly log: Log
  readonly startedAt = performance.now()
  readonly deadline: number
  /** Nodes that have failed this request. */
  readonly avoided = new Set<string>()
  /** What nodes have answered that must not get this request again. */
  readonly answered = new Map<string, AdapterError>()
  /** One of them had not answered in time. */
  late = false
  /** Engine ids by item, once encoded. */
  encodedBy: readonly string[] = []
  plan: Plan | undefined
  attempts = 0
  /** Why the request can not go on. */
  cancelled: unknown
  /** Why the next plan must use a single node: P and D could not share the request. */
  singleNode: SingleNode | undefined
  #request: GatewayRequest | undefined
  readonly #id: string
  #via: Readonly<Record<string, string>> = {}
  encodeCalls = 0
  #checked = false
  #pass: Pass | undefined
  /** What nodes hold for it, if they do. */
  held: Leases | undefined
  /** Of this attempt's stages, where it has media. */
  timing: Timing | undefined
  /** The client's stream, when it has begun before the answer. */
  live: LiveStream | undefined
  /** Gets signs of life for the client. */
  onAlive: ((bytes: Buffer, response?: UpstreamResponse) => void) | undefined
  #beat: NodeJS.Timeout | undefined
  readonly #calls = new Set<TimeLimit>()
  closed = false

  constructor (core: Core, request: GatewayRequest) {
    this.core = core
    this.#request = request
    this.#id = request.id
    this.deadline = this.startedAt + core.options.timeouts.total
    this.trace = startRequest(core.tracing, {
      headers: request.headers,
      model: request.body.model,
      operation: this.operation,
      arrivedAt: request.arrivedAt,
      attributes: { [ATTR.requestStream]: request.body.stream, [ATTR.requestId]: request.id, [ATTR.items]: request.body.media.length, [ATTR.key]: request.holder?.name }
    })
    this.log = new TracedLog(request.log, this.trace.traceId)
    if (this.trace.kept) core.thumbnails?.keep(this.trace.traceId!, request.body)
    core.requests.add(this)
    request.onClientGone(() => { this.cancel(epdError('EPD_ERR_CLIENT_CLOSED_REQUEST')) })
  }

  /** @throws EPD_ERR_LOOP */
  checkRing (): void {
    this.#via = this.core.via(this.request.headers)
  }

  /** Until `close`. */
  get request (): GatewayRequest {
    return this.#request!
  }

  get operation (): string {
    return OPERATIONS[this.request.path] ?? 'chat'
  }

  get clientGone (): boolean {
    return this.cancelled !== undefined && (this.cancelled as { statusCode?: unknown }).statusCode === 499
  }

  /** Waits for admission. */
  async enter (tokens: number): Promise<void> {
    const { body: { model }, tenant, holder } = this.request
    this.#pass = await this.#wait(limit => this.core.admission.enter({ tokens, model, tenant: holder?.name ?? tenant, priority: holder?.priority }, limit))
  }

  /** Puts the pictures to the test, once. Those behind addresses stand in the body afterwards. */
  async checkMedia (): Promise<void> {
    if (this.#checked) return
    const { request } = this
    this.#request = { ...request, body: await this.#wait(limit => abortable(this.core.mediaCheck.check(request.body, limit), limit)) }
    this.#checked = true
  }

  async #wait<T> (work: (limit: TimeLimit) => Promise<T>): Promise<T> {
    const limit = this.open(Infinity)
    try {
      return await work(limit)
    } catch (err) {
      throw this.failure(err, limit)
    } finally {
      this.shut(limit)
    }
  }

  /**
   * The request is accepted: what is to be streamed may begin before its answer does, so that nothing on the way takes the
   * silence for the end. The first event is still held back, and the request may still start again.
   *
   * @param deliver sends the stream to the client when it begins
   */
  keepAlive (deliver: (live: LiveStream) => void): void {
    const { keepAlive } = this.core.options.sse
    this.onAlive = (bytes, response) => {
      if (this.cancelled !== undefined || this.closed) return
      if (this.live === undefined) deliver(this.live = new LiveStream(response?.headers))
      this.live.show(bytes)
    }
    if (keepAlive > 0) this.#beat = setInterval(() => { this.onAlive!(KEEP_ALIVE) }, keepAlive)
  }

  /** The answer has begun, or there will be none. */
  endKeepAlive (): void {
    clearInterval(this.#beat)
    this.onAlive = undefined
  }

  /** The encoders have nothing more to do for it: others may use them. */
  leaveEncoders (): void {
    this.#pass?.leaveEncoders()
  }

  /** Its vision work is done: others may come in. */
  leave (): void {
    this.#pass?.release()
    this.#pass = undefined
  }

  /** Opens a call to a node, or a wait. @param ms timeout of the stage; the request's own deadline may come first */
  open (ms: number): TimeLimit {
    if (this.cancelled !== undefined) throw this.cancelled
    const limit = new TimeLimit(Math.max(1, Math.min(ms, this.deadline - performance.now())))
    this.#calls.add(limit)
    return limit
  }

  shut (limit: TimeLimit): void {
    limit.clear()
    this.#calls.delete(limit)
  }

  /** Another one for each attempt: aborting the first on a node must not hit the second. */
  get callId (): string {
    return this.attempts > 1 ? `${this.#id}-${this.attempts}` : this.#id
  }

  /** Of the request at P. */
  get prefillId (): string {
    return `${this.callId}.p`
  }

  call (signal: TimeLimit, span: StageSpan, id: string): Call {
    const { headers } = span
    headers[REQUEST_ID_HEADER] = id
    for (const name in this.#via) headers[name] = this.#via[name]!
    return { signal, headers, dispatcher: this.core.dispatcher, log: this.log, onAlive: this.onAlive }
  }

  /** What a failed call means: the request was cancelled, its deadline has passed, its node hangs, or what the adapter says. */
  failure (error: unknown, limit: TimeLimit, node = '', called = ''): unknown {
    if (this.cancelled !== undefined) return this.cancelled
    if (!limit.timedOut) return limit.aborted ? error : adaptersError(error, node, called)
    if (performance.now() + TIMER_SLACK_MS >= this.deadline) return epdError('EPD_ERR_DEADLINE')
    return new AdapterError('UNAVAILABLE', 'no answer in time', { node, how: 'late' })
  }

  /** For what a node has begun to hold. */
  get leases (): Leases {
    return (this.held ??= new Leases(this))
  }

  /** A call to a node beside the request's own life, often the last. Best effort. */
  callAside (work: (call: Call) => Promise<void>, span: StageSpan = this.trace, id = this.callId): void {
    const limit = new TimeLimit(ASIDE_MS)
    const done = this.trace.run(() => abortable(work(this.call(limit, span, id)), limit))
    this.core.requests.background(done.catch((err: unknown) => { this.log.debug({ err }, 'a call to a node aside failed') }).finally(() => { limit.clear() }))
  }

  /** Ends every call in flight with this reason; the request can not go on. */
  cancel (reason: unknown): void {
    if (this.cancelled !== undefined || this.closed) return
    this.cancelled = reason
    this.abortCalls(reason)
  }

  abortCalls (reason: unknown): void {
    for (const limit of this.#calls) limit.abort(reason)
  }

  /** The response headers that show how the request was routed. */
  headers (): Record<string, string> {
    const headers: Record<string, string> = {}
    if (this.plan !== undefined) {
      headers['x-epd-plan'] = this.plan.topology
      headers['x-epd-reason'] = this.plan.reason
    }
    if (this.encodedBy.length > 0) headers['x-epd-encoders'] = this.encodedBy.join(',')
    const { traceId } = this.trace
    if (traceId !== undefined && this.trace.kept) headers['x-epd-trace-id'] = traceId
    return headers
  }

  /** The only way out. Gives everything back; called again it does nothing. */
  close (): void {
    if (this.closed) return
    this.closed = true
    if (this.#calls.size > 0) this.abortCalls(this.cancelled ?? new DOMException('The request is over', 'AbortError'))
    this.endKeepAlive()
    this.held?.release()
    this.leave()
    this.core.requests.delete(this)
    // The connection's listener refers to this exchange for longer: one that idles must keep no body in memory.
    this.#request = undefined
  }
}

/** Puts the trace id, if there is one, on every line. A child logger costs more to make than most requests ever log. */
class TracedLog implements Log {
  readonly #log: Log
  readonly #traceId: string | undefined

  constructor (log: Log, traceId: string | undefined) {
    this.#log = log
    this.#traceId = traceId
  }

  debug (own: object, message: string): void { this.#log.debug({ trace_id: this.#traceId, ...own }, message) }
  info (own: object, message: string): void { this.#log.info({ trace_id: this.#traceId, ...own }, message) }
  warn (own: object, message: string): void { this.#log.warn({ trace_id: this.#traceId, ...own }, message) }
  error (own: object, message: string): void { this.#log.error({ trace_id: this.#traceId, ...own }, message) }
}
