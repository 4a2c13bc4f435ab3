import { AdapterError, type EncoderResult, type UpstreamResponse } from '../../adapters/adapter.ts'
import type { Plan } from '../planning/index.ts'
import type { Ticket } from '../registry/index.ts'
import { ATTR, SPAN } from '../telemetry/semconv.ts'
import type { OpenStage } from '../telemetry/spans.ts'
import type { CallScope } from './call-scope.ts'
import type { Exchange } from './exchange.ts'
import { IdleWatch } from './idle.ts'
import type { Delivery } from './types.ts'

/** A generate call under way. `end` must be called once, whatever comes of it. */
export interface Generation {
  readonly upstream: UpstreamResponse
  /** Its answer has been delivered, or has failed: `error` undefined is success. */
  end (error: unknown, delivery?: Delivery): void
}

/**
 * Calls the language model and resolves at its first good event: it has pulled the features. The leases are forgotten
 * only when the answer is whole, as a model that dies may not have got its ACK out.
 */
export async function generateStage (exchange: Exchange, plan: Plan, features: readonly EncoderResult[]): Promise<Generation> {
  const { core, request } = exchange
  const { node } = plan
  const { timeouts } = core.options
  const scope = exchange.open(request.body.stream ? timeouts.firstByte : timeouts.answer)
  const ticket = core.registry.acquire(node.id, 'decode', plan.topology === 'hybrid' ? visionTokens(exchange) : 0)
  // When nothing is recorded the request's own span carries the client's trace context on as well.
  const span = exchange.trace.recording ? exchange.trace.begin(SPAN.decode, { [ATTR.node]: node.id }) : undefined
  const end = ending(exchange, plan, scope, ticket, span)
  try {
    const job = { node: node.node, path: request.path, body: request.body, features }
    const upstream = await scope.run(() => node.adapter.generate(job, exchange.call(scope, span ?? exchange.trace)), late => { late.destroy() })
    ticket.ok()
    exchange.leave()
    return { upstream: new IdleWatch(upstream, scope, timeouts.idle), end }
  } catch (err) {
    const failure = exchange.failure(err, scope, node.id)
    if (AdapterError.is(failure)) noteFailure(exchange, plan, features, failure)
    end(failure)
    throw failure
  }
}

function ending (exchange: Exchange, plan: Plan, scope: CallScope, ticket: Ticket, span: OpenStage | undefined): Generation['end'] {
  const { node } = plan
  const id = exchange.callId
  return (error, delivery) => {
    const aborted = exchange.cancelled !== undefined || delivery?.outcome === 'client_gone'
    if (aborted || scope.timedOut) {
      scope.abort(error)
      exchange.farewell(call => node.adapter.abort(node.node, id, call))
    }
    exchange.shut(scope)
    ticket.end(aborted ? new DOMException('aborted', 'AbortError') : error)
    span?.end(aborted ? { aborted } : { error })
  }
}

function noteFailure (exchange: Exchange, plan: Plan, features: readonly EncoderResult[], failure: AdapterError): void {
  if (failure.code === 'UNAVAILABLE' || failure.code === 'BUSY') exchange.avoid(plan.node.id)
  if (failure.unlinked !== true) return
  for (const encoder of new Set(features.map(feature => feature.node))) exchange.core.registry.linkLost(encoder, plan.node.id)
}

export function visionTokens ({ request }: Exchange): number {
  return request.body.media.reduce((sum, item) => sum + item.tokens, 0)
}
