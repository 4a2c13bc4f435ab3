import { AdapterError, type EncoderResult, type Handoff, type RequestBody } from '../../adapters/adapter.ts'
import { abortable } from '../../adapters/abort.ts'
import type { Plan } from '../planning/index.ts'
import { ATTR, SPAN } from '../../adapters/wire/semconv.ts'
import { beginAnswer } from './answer.ts'
import type { Answer, Delivery } from './answer-stream.ts'
import type { Exchange } from './exchange.ts'

const NO_FEATURES: readonly EncoderResult[] = []

/** A generate call under way. `end` must be called once, whatever comes of it. */
export interface Generation {
  readonly answer: Answer
  /** Its answer has been delivered, or has failed: `error` undefined is success. */
  end (error: unknown, delivery?: Delivery): void
}

/**
 * Calls the node that answers and resolves at its first good event: it has pulled the features, or the KV blocks. The
 * exchange forgets leases on features only when the answer is whole, because a model that dies may not have got its ACK
 * out; that on KV blocks at once, because P may free a session only once.
 */
export async function generateStage (exchange: Exchange, plan: Plan, features: readonly EncoderResult[], handoff: Handoff | undefined): Promise<Generation> {
  const { core: { options: { timeouts }, registry }, request: { body, path, tenant } } = exchange
  const { node } = plan
  const id = exchange.callId
  const limit = exchange.open(body.stream ? timeouts.firstByte : timeouts.answer)
  const ticket = registry.acquire(node.id, 'decode', plan.topology === 'hybrid' ? visionTokens(body) : 0)
  const span = exchange.trace.begin(SPAN.decode, { [ATTR.node]: node.id })
  const end: Generation['end'] = (error, delivery) => {
    const aborted = exchange.cancelled !== undefined || delivery?.outcome === 'client_gone'
    if (aborted || limit.timedOut) {
      limit.abort(error)
      exchange.cleanupCall(call => node.adapter.abort(node, id, call))
    }
    exchange.shut(limit)
    ticket.end(aborted ? new DOMException('aborted', 'AbortError') : error)
    span.end(aborted ? { aborted } : { error })
  }
  try {
    const job = { node, path, body, features: handoff === undefined ? features : NO_FEATURES, handoff, tenant }
    const upstream = await span.run(() => abortable(node.adapter.generate(job, exchange.call(limit, span, id)), limit, late => { late.body.destroy() }))
    const answer = await beginAnswer(node.id, upstream, limit, timeouts.idle)
    exchange.forgetHandoff()
    ticket.ok()
    exchange.leave()
    return { answer, end }
  } catch (err) {
    const failure = exchange.failure(err, limit, node.id)
    if (AdapterError.is(failure)) noteFailure(exchange, plan, features, failure)
    end(failure)
    throw failure
  }
}

/** Vision tokens of all media items. */
export function visionTokens ({ media }: RequestBody): number {
  return media.reduce((sum, item) => sum + item.tokens, 0)
}

function noteFailure (exchange: Exchange, { node, prefill }: Plan, features: readonly EncoderResult[], { code, unlinked }: AdapterError): void {
  if (code === 'UNAVAILABLE' || code === 'BUSY' || (code === 'REFUSED' && prefill !== undefined)) exchange.avoided.add(node.id)
  // Only P knows why its KV blocks are gone; it may be gone itself.
  if (code === 'KV_GONE' && prefill !== undefined) exchange.avoided.add(prefill.id)
  if (!unlinked) return
  const producers = prefill === undefined ? features.map(feature => feature.node) : [prefill.id]
  for (const producer of new Set(producers)) exchange.core.registry.linkLost(producer, node.id)
}
