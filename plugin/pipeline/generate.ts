import { AdapterError, type EncoderResult, type UpstreamResponse } from '../../adapters/adapter.ts'
import type { Plan } from '../planning/index.ts'
import type { Ticket } from '../registry/index.ts'
import { ATTR, SPAN } from '../../adapters/wire/semconv.ts'
import type { OpenStage } from '../telemetry/spans.ts'
import type { CallScope } from './call-scope.ts'
import type { Exchange } from './exchange.ts'
import { IdleWatch } from './idle.ts'
import type { Prefill } from './prefill.ts'
import type { Delivery } from './types.ts'

const NO_FEATURES: readonly EncoderResult[] = []

/** A generate call under way. `end` must be called once, whatever comes of it. */
export interface Generation {
  readonly upstream: UpstreamResponse
  /** Its answer has been delivered, or has failed: `error` undefined is success. */
  end (error: unknown, delivery?: Delivery): void
}

/**
 * Calls the node that answers and resolves at its first good event: it has pulled the features, or the KV blocks. Leases on
 * features are forgotten only when the answer is whole, as a model that dies may not have got its ACK out; that on KV
 * blocks at once, as P may free a session but once.
 */
export async function generateStage (exchange: Exchange, plan: Plan, features: readonly EncoderResult[], prefill?: Prefill): Promise<Generation> {
  const { core, request } = exchange
  const { node } = plan
  const { timeouts } = core.options
  const scope = exchange.open(request.body.stream ? timeouts.firstByte : timeouts.answer)
  const ticket = core.registry.acquire(node.id, 'decode', plan.topology === 'hybrid' ? visionTokens(exchange) : 0)
  // When nothing is recorded the request's own span carries the client's trace context on as well.
  const span = exchange.trace.recording ? exchange.trace.begin(SPAN.decode, { [ATTR.node]: node.id }) : undefined
  const end = ending(exchange, plan, scope, ticket, span)
  try {
    const job = { node, path: request.path, body: request.body, features: prefill === undefined ? features : NO_FEATURES, handoff: prefill?.handoff, tenant: request.tenant }
    const stage = span ?? exchange.trace
    const answered = stage.run(() => scope.run(() => node.adapter.generate(job, exchange.call(scope, stage)), late => { late.destroy() }))
    const upstream = await (prefill === undefined ? answered : unlessPrefillFails(answered, prefill, scope))
    exchange.forgetHandoff()
    ticket.ok()
    exchange.leave()
    return { upstream: new IdleWatch(upstream, scope, timeouts.idle), end }
  } catch (err) {
    const failure = exchange.failure(err, scope, node.id)
    if (err instanceof PrefillFailed) {
      end(new DOMException('P has failed', 'AbortError'))
      throw err.cause
    }
    prefill?.abandon(new DOMException('D has failed', 'AbortError'))
    if (AdapterError.is(failure)) noteFailure(exchange, plan, features, failure)
    end(failure)
    throw failure
  }
}

/** P was still at it when D was called, and has failed: nothing is D's fault. */
class PrefillFailed extends Error {}

function unlessPrefillFails<T> (answered: Promise<T>, { settled }: Prefill, scope: CallScope): Promise<T> {
  let begun = false
  settled.catch((cause: unknown) => { if (!begun) scope.abort(new PrefillFailed('P has failed', { cause })) })
  return answered.finally(() => { begun = true })
}

function ending (exchange: Exchange, plan: Plan, scope: CallScope, ticket: Ticket, span: OpenStage | undefined): Generation['end'] {
  const { node } = plan
  const id = exchange.callId
  return (error, delivery) => {
    const aborted = exchange.cancelled !== undefined || delivery?.outcome === 'client_gone' || scope.reason instanceof PrefillFailed
    if (aborted || scope.timedOut) {
      scope.abort(error)
      exchange.farewell(call => node.adapter.abort(node, id, call))
    }
    exchange.shut(scope)
    ticket.end(aborted ? new DOMException('aborted', 'AbortError') : error)
    span?.end(aborted ? { aborted } : { error })
  }
}

function noteFailure (exchange: Exchange, { node, prefill }: Plan, features: readonly EncoderResult[], { code, unlinked }: AdapterError): void {
  if (code === 'UNAVAILABLE' || code === 'BUSY' || (code === 'REFUSED' && prefill !== undefined)) exchange.avoid(node.id)
  // Nobody but P knows why its KV blocks are gone; it may be gone itself.
  if (code === 'KV_GONE' && prefill !== undefined) exchange.avoid(prefill.id)
  if (!unlinked) return
  const producers = prefill === undefined ? features.map(feature => feature.node) : [prefill.id]
  for (const producer of new Set(producers)) exchange.core.registry.linkLost(producer, node.id)
}

export function visionTokens ({ request }: Exchange): number {
  return request.body.media.reduce((sum, item) => sum + item.tokens, 0)
}
