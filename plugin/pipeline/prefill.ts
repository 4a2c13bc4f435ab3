import { AdapterError, type EncoderResult, type Handoff } from '../../adapters/adapter.ts'
import { promptTokens, type Plan } from '../planning/index.ts'
import type { Ticket } from '../registry/index.ts'
import { ATTR, SPAN } from '../../adapters/wire/semconv.ts'
import type { OpenStage } from '../telemetry/spans.ts'
import type { CallScope } from './call-scope.ts'
import type { Exchange } from './exchange.ts'

/** P's share of a request, done or, with an adapter that starts D at once, under way. */
export interface Prefill {
  readonly handoff: Handoff
  /** Resolves when P is done; rejects with what went wrong. Never unhandled. */
  readonly settled: Promise<void>
  /** What P is still doing is of no use. Does nothing once it is done. */
  abandon (reason: unknown): void
}

/** The use of P for one request, ended once in whatever way. */
class Use {
  readonly #exchange: Exchange
  readonly #plan: Plan
  readonly #features: readonly EncoderResult[]
  readonly #ticket: Ticket
  readonly id: string
  readonly scope: CallScope
  readonly span: OpenStage | undefined

  constructor (exchange: Exchange, plan: Plan, features: readonly EncoderResult[]) {
    const { core, trace } = exchange
    const { id } = plan.prefill!
    this.#exchange = exchange
    this.#plan = plan
    this.#features = features
    this.id = `${exchange.callId}.p`
    this.scope = exchange.open(core.options.timeouts.prefill)
    this.#ticket = core.registry.acquire(id, 'prefill', promptTokens(exchange.request.body))
    this.span = trace.recording ? trace.begin(SPAN.prefill, { [ATTR.node]: id }) : undefined
  }

  succeed ({ tokens, cached }: Handoff): void {
    if (this.span?.recording === true) {
      this.span.set({ ...(tokens === undefined ? {} : { [ATTR.tokens]: tokens }), ...(cached === undefined ? {} : { [ATTR.cached]: cached }) })
    }
    this.#end(undefined)
    // Its vision work is done.
    this.#exchange.leave()
  }

  /** @returns what the failure means */
  fail (error: unknown): unknown {
    const exchange = this.#exchange
    const node = this.#plan.prefill!
    const { adapter, id } = node
    const failure = exchange.failure(error, this.scope, id)
    if (AdapterError.is(failure)) noteFailure(exchange, this.#plan, this.#features, failure)
    // It may have answered all the same: a lease that nobody has read is ended by the call it was for.
    if (this.scope.aborted || (AdapterError.is(failure) && failure.code === 'UNAVAILABLE')) exchange.farewell(call => adapter.abort(node, this.id, call))
    this.#end(failure)
    return failure
  }

  #end (failure: unknown): void {
    this.#exchange.shut(this.scope)
    this.#ticket.end(failure)
    this.span?.end(failure === undefined ? {} : this.scope.aborted && !this.scope.timedOut ? { aborted: true } : { error: failure })
  }
}

/**
 * Has P compute the prompt for D. The link is made first, so that no KV blocks wait for it. The hand-off's lease is held
 * by the exchange from here on.
 */
export async function prefillStage (exchange: Exchange, plan: Plan, features: readonly EncoderResult[]): Promise<Prefill> {
  const { core: { registry }, request: { body, path, tenant } } = exchange
  const node = plan.prefill!
  const { id, adapter } = node
  const use = new Use(exchange, plan, features)
  const { scope } = use
  const stage = use.span ?? exchange.trace
  try {
    const { handoff, settled } = await stage.run(() => scope.run(async () => {
      if (registry.snapshot().link(id, plan.node.id) !== 'linked') await registry.ensureLink(id, plan.node.id, scope.signal)
      return await adapter.prefill({ node, decode: plan.node, path, body, features, tenant }, exchange.call(scope, stage, use.id))
    }, late => {
      late.settled.catch(() => {})
      const { lease, wire } = late.handoff
      exchange.farewell(call => adapter.release([{ node, lease, wire }], call))
    }))
    exchange.holdHandoff(adapter, node, handoff)
    const done = scope.run(() => settled, () => {}).then(() => { use.succeed(handoff) }, (err: unknown) => { throw use.fail(err) })
    done.catch(() => {})
    return { handoff, settled: done, abandon: reason => { scope.abort(reason) } }
  } catch (err) {
    throw use.fail(err)
  }
}

function noteFailure (exchange: Exchange, { prefill, node }: Plan, features: readonly EncoderResult[], failure: AdapterError): void {
  const { registry } = exchange.core
  const { id } = prefill!
  if (failure.singleNode) exchange.singleNode ??= { what: 'not to be shared by two nodes', source: 'attempt' }
  else if (failure.code !== 'FEATURES_GONE' && failure.code !== 'REJECTED') exchange.avoid(id)
  if (failure.code === 'REFUSED' && registry.snapshot().link(id, node.id) === 'linked') registry.refuseLinks(id, failure.message)
  if (failure.code === 'FEATURES_GONE' && failure.unlinked) for (const encoder of new Set(features.map(feature => feature.node))) registry.linkLost(encoder, id)
}
