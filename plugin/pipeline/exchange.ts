import { AdapterError, type Adapter, type AdapterNode, type Call, type EncoderResult, type Handoff, type LeaseRef, type Log } from '../../adapters/adapter.ts'
import { epdError } from '../errors.ts'
import type { Plan, SingleNode } from '../planning/index.ts'
import { ATTR } from '../../adapters/wire/semconv.ts'
import { startRequest, type RequestTrace, type StageSpan } from '../telemetry/spans.ts'
import type { Pass, Waiting } from './admission.ts'
import { CallScope } from './call-scope.ts'
import type { Linked } from './linked-list.ts'
import { RequestLog } from './request-log.ts'
import type { Core, GatewayRequest } from './types.ts'

interface HeldLease { readonly adapter: Adapter, readonly lease: LeaseRef }

const OPERATIONS: Readonly<Record<string, string>> = { '/v1/completions': 'text_completion', '/v1/embeddings': 'embeddings' }
/** How long ending leases and aborting a request on a node may take, after the request itself is over. */
const FAREWELL_MS = 5_000
const NOBODY: ReadonlySet<string> = new Set()

/** What a call carries. A class, as its signal is made only for those who ask. */
class ScopedCall implements Call {
  readonly end: CallScope
  readonly headers: Readonly<Record<string, string>>
  readonly dispatcher: Call['dispatcher']
  readonly log: Log

  constructor (end: CallScope, headers: Readonly<Record<string, string>>, dispatcher: Call['dispatcher'], log: Log) {
    this.end = end
    this.headers = headers
    this.dispatcher = dispatcher
    this.log = log
  }

  get signal (): AbortSignal {
    return this.end.signal
  }
}

/**
 * One request from arrival to its end: everything it holds, so that there is one place where it is given back. Whatever
 * the way out, `close` is the only exit: signals abort, leases without ACK are released, the admission pass returns, the
 * span ends.
 */
export class Exchange implements Linked {
  readonly core: Core
  readonly request: GatewayRequest
  readonly trace: RequestTrace
  /** The request's own, with the trace id on every line. */
  readonly log: Log
  readonly startedAt = performance.now()
  readonly deadline: number
  before: Linked | undefined
  after: Linked | undefined
  /** Engine ids by item, once encoded. */
  encodedBy: readonly string[] = []
  plan: Plan | undefined
  attempts = 0
  cancelled: unknown
  /** An attempt has shown that P and D can't share it: the next plan is for a single node. */
  singleNode: SingleNode | undefined
  #encodeCalls = 0
  #avoid: Set<string> | undefined
  #pass: Pass | undefined
  #waiting: Waiting | undefined
  #leases: HeldLease[] = []
  #handoff: HeldLease | undefined
  #scopes: CallScope[] = []
  #closed = false

  /** Nodes that have failed this request. */
  get avoided (): ReadonlySet<string> {
    return this.#avoid ?? NOBODY
  }

  avoid (node: string): void {
    this.#avoid ??= new Set()
    this.#avoid.add(node)
  }

  get operation (): string {
    return OPERATIONS[this.request.path] ?? 'chat'
  }

  constructor (core: Core, request: GatewayRequest) {
    this.core = core
    this.request = request
    this.deadline = this.startedAt + core.options.timeouts.total
    this.trace = startRequest({
      headers: request.headers,
      model: request.body.model,
      operation: this.operation,
      arrivedAt: request.arrivedAt,
      attributes: { [ATTR.requestStream]: request.body.stream, [ATTR.requestId]: request.id, [ATTR.items]: request.body.media.length }
    })
    this.log = new RequestLog(request.log, this.trace)
    if (this.trace.recording) core.thumbnails?.keep(this.trace.traceId, request.body)
    core.began(this)
    request.signal.addEventListener('abort', this.#onAbort)
    if (request.signal.aborted) this.#onAbort()
  }

  readonly #onAbort = (): void => { this.cancel(epdError('EPD_ERR_CLIENT_CLOSED_REQUEST')) }

  /** Waits for admission, if the request has media. */
  async enter (tokens: number): Promise<void> {
    if (this.cancelled !== undefined) throw this.cancelled
    const entry = this.core.admission.enter(tokens)
    if ('release' in entry) { this.#pass = entry; return }
    this.#waiting = entry
    try {
      this.#pass = await entry.admitted
    } finally {
      this.#waiting = undefined
    }
    if (this.#closed) this.leave()
  }

  /** Its vision work is done: others may come in. */
  leave (): void {
    this.#pass?.release()
    this.#pass = undefined
  }

  /** Opens the scope of an upstream call. @param ms timeout of the stage; the request's own deadline may come first */
  open (ms: number): CallScope {
    if (this.cancelled !== undefined) throw this.cancelled
    const scope = new CallScope(this.core.deadlines, Math.min(performance.now() + ms, this.deadline))
    this.#scopes.push(scope)
    return scope
  }

  shut (scope: CallScope): void {
    scope.disarm()
    const at = this.#scopes.indexOf(scope)
    if (at !== -1) this.#scopes.splice(at, 1)
  }

  /** Another one for each attempt: aborting the first on a node must not hit the second. */
  get callId (): string {
    return this.attempts > 1 ? `${this.request.id}-${this.attempts}` : this.request.id
  }

  /** Another one for each encode call: an encoder may get several of one request, and aborting one must hit that one alone. */
  nextEncodeId (): string {
    return `${this.callId}.e${++this.#encodeCalls}`
  }

  call (scope: CallScope, span: StageSpan, id = this.callId): Call {
    const { headers } = span
    headers['x-request-id'] = id
    return new ScopedCall(scope, headers, this.core.dispatcher, this.log)
  }

  /** What a failed call means: the request was cancelled, its deadline has passed, its node hangs, or what the adapter says. */
  failure (error: unknown, scope: CallScope, node: string): unknown {
    if (this.cancelled !== undefined) return this.cancelled
    if (!scope.timedOut) return error
    if (performance.now() >= this.deadline) return epdError('EPD_ERR_DEADLINE')
    return new AdapterError('UNAVAILABLE', 'no answer in time', { node, cause: epdError('EPD_ERR_UPSTREAM_TIMEOUT') })
  }

  hold (adapter: Adapter, node: AdapterNode, results: readonly EncoderResult[]): void {
    for (const { lease, wire } of results) this.#leases.push({ adapter, lease: { node, lease, wire } })
    if (this.#closed) this.releaseLeases()
  }

  /** Of a prefill; D ends it, unless it comes to `releaseLeases` before. */
  holdHandoff (adapter: Adapter, node: AdapterNode, { lease, wire }: Handoff): void {
    this.#handoff = { adapter, lease: { node, lease, wire } }
    if (this.#closed) this.releaseLeases()
  }

  /** D has the KV blocks and has said so to P: ending the lease once more could end another's. */
  forgetHandoff (): void {
    this.#handoff = undefined
  }

  /** Somebody else ends them now: the consumer has ACKed. */
  forgetLeases (): void {
    this.#leases = []
  }

  releaseLeases (): void {
    if (this.#leases.length === 0 && this.#handoff === undefined) return
    const held = this.#handoff === undefined ? this.#leases : [...this.#leases, this.#handoff]
    this.#leases = []
    this.#handoff = undefined
    for (const adapter of new Set(held.map(one => one.adapter))) {
      const leases = held.filter(one => one.adapter === adapter).map(one => one.lease)
      this.farewell(call => adapter.release(leases, call))
    }
  }

  /** A last call to a node, outside the request's own life. Best effort. */
  farewell (work: (call: Call) => Promise<void>): void {
    const scope = new CallScope(this.core.deadlines, performance.now() + FAREWELL_MS)
    const done = this.trace.run(() => scope.run(() => work(this.call(scope, this.trace)), () => {}))
    this.core.background(done.catch((err: unknown) => { this.log.debug({ err }, 'a farewell to a node failed') }).finally(() => { scope.disarm() }))
  }

  /** Ends every call in flight with this reason; the request can not go on. */
  cancel (reason: unknown): void {
    if (this.cancelled !== undefined || this.#closed) return
    this.cancelled = reason
    this.#waiting?.leave(reason)
    this.abortCalls(reason)
  }

  abortCalls (reason: unknown): void {
    const scopes = this.#scopes
    this.#scopes = []
    for (const scope of scopes) scope.abort(reason)
  }

  /** The response headers that tell how the request was routed. */
  headers (): Record<string, string> {
    const headers: Record<string, string> = {}
    if (this.plan !== undefined) {
      headers['x-epd-plan'] = this.plan.topology
      headers['x-epd-reason'] = this.plan.reason
    }
    if (this.encodedBy.length > 0) headers['x-epd-encoders'] = this.encodedBy.join(',')
    const { traceId } = this.trace
    if (traceId !== undefined) headers['x-epd-trace-id'] = traceId
    return headers
  }

  /** The only way out. Gives everything back; called again it does nothing. */
  close (): void {
    if (this.#closed) return
    this.#closed = true
    this.request.signal.removeEventListener('abort', this.#onAbort)
    if (this.#scopes.length > 0) this.abortCalls(this.cancelled ?? new DOMException('The request is over', 'AbortError'))
    this.releaseLeases()
    this.leave()
    this.core.ended(this)
  }
}
