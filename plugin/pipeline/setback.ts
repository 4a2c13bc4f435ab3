/** What a request does when a call to a node has failed. */
import { AdapterError, type EncoderResult, type Stage } from '../../adapters/adapter.ts'
import { epdError, isEpdError } from '../errors.ts'
import type { Plan, Refusal } from '../planning/index.ts'
import { againAfter, clientsError, outcomeOf, saysMore } from './blame.ts'
import type { Delivery } from './answer-stream.ts'
import { EncodersExhausted } from './encode.ts'
import type { Exchange } from './exchange.ts'
import type { LiveStream } from './live-stream.ts'

/** However often nodes leave, a request is planned no more often. */
const MAX_ATTEMPTS = 8

/**
 * Readies the request for another attempt.
 *
 * @param lost encoders that the attempt was not to try
 * @param before why two nodes could not share the request, where that was known when the attempt began
 * @returns encoders that the next one must not try
 * @throws what the request ends with, when it may not start again
 */
export async function startAgain (exchange: Exchange, err: unknown, lost: ReadonlySet<string> | undefined, before: unknown): Promise<ReadonlySet<string> | undefined> {
  exchange.held?.release()
  if (err instanceof EncodersExhausted) {
    // The order was made when the request began: encoders may have come back since. Once.
    lost = lost === undefined && exchange.cancelled === undefined ? await stillLost(exchange, err) : undefined
    if (lost === undefined) throw exhaustedError(err)
  } else if (!mayStartAgain(exchange, err, before)) throw err
  exchange.core.stats.retried.add(1, AdapterError.is(err) ? err.code.toLowerCase() : 'unavailable')
  exchange.log.warn({ err }, 'attempt failed before the first byte; starting again at the plan')
  return lost
}

/** May the request start again at the plan? To find out that two nodes can't share it is no failure, and costs no retry. */
function mayStartAgain (exchange: Exchange, err: unknown, before: unknown): err is AdapterError {
  if (exchange.cancelled !== undefined || performance.now() >= exchange.deadline || !AdapterError.is(err)) return false
  if (err.singleNode && before === undefined) return true
  const left = exchange.attempts < MAX_ATTEMPTS && nodesHaveLeft(exchange)
  if (!left && exchange.attempts > exchange.core.options.retries) return false
  if (outcomeOf(err) === 'late') {
    // Nodes with too much to do answer late: a third one would get this on top.
    if (exchange.late) return false
    exchange.late = true
  }
  // Two nodes that can't work together are not planned together again.
  return err.code === 'REFUSED' ? left || exchange.plan?.prefill !== undefined : againAfter(err, 'decode') !== 'no'
}

/** Nodes that were taken out since the plan was made, and maybe put in again, have not failed the request: it costs no retry. */
function nodesHaveLeft ({ plan, core: { registry } }: Exchange): boolean {
  const { byId } = registry.snapshot()
  return plan !== undefined && [plan.node, plan.prefill, ...plan.order.flat()].some(node => node !== undefined && byId.get(node.id)?.info === undefined)
}

/** The next plan avoids a node that has failed this request; one that has answered gets it no second time. */
export function avoidNode ({ avoided, answered }: Exchange, node: string, failure: AdapterError, stage: Stage): void {
  avoided.add(node)
  if (againAfter(failure, stage) === 'elsewhere') answered.set(node, failure)
}

/** What a node had made can't be used by the next one: the next plan avoids it, and its breaker learns of it. */
export function blameProducer ({ avoided, core: { registry } }: Exchange, failure: AdapterError, stage: Stage): void {
  if (failure.producer === undefined) return
  avoided.add(failure.producer)
  registry.acquire(failure.producer, stage).end(failure, 'failed')
}

/** The encoders that a request which has lost all of its own must not try again; undefined when none is left, or back. */
async function stillLost ({ core: { registry }, request }: Exchange, { failed, plan }: EncodersExhausted): Promise<ReadonlySet<string> | undefined> {
  const epochs = new Map(plan.order.flat().map(({ id, info }) => [id, info?.epoch]))
  const lost = new Set(failed.keys())
  await Promise.all([...failed].map(async ([id, outcome]) => {
    const answers = await registry.ask(id)
    if (answers && (outcome === 'unreachable' || registry.get(id)?.info?.epoch !== epochs.get(id))) lost.delete(id)
  }))
  const left = registry.snapshot().nodes.some(({ id, role, state, models }) => role === 'encoder' && state === 'healthy' && models.includes(request.body.model) && !lost.has(id))
  return left ? lost : undefined
}

/** The error for clients when no encoder is left and the language model can't encode either. */
export function exhaustedError ({ last }: Pick<EncodersExhausted, 'last'>): unknown {
  return last === undefined ? epdError('EPD_ERR_ENCODE_FAILED') : clientsError(last, 'encode')
}

/** The client's stream has begun: its end says what has failed. */
export async function endLive (live: LiveStream, { log, clientGone }: Exchange, error: unknown): Promise<Delivery> {
  if (clientGone) live.destroy()
  else {
    log.error({ err: error }, 'request failed after its stream had begun with a sign of life')
    live.fail(error)
  }
  return await live.delivered
}

/** What the client sees of a request that has failed for good. */
export function finalError ({ answered, core: { registry }, request }: Exchange, err: unknown): unknown {
  const told = [...answered.values()].find(one => saysMore(one, err))
  const error = clientsError(told ?? err, 'decode')
  if (!isEpdError(error) || error.retryAfter !== undefined) return error
  const rest = registry.restOf(request.body.model)
  return rest === undefined ? error : error.withRetryAfter(rest)
}

/** What the failure of a generate call says of the request's nodes. */
export function noteFailure (exchange: Exchange, { node, prefill }: Plan, features: readonly EncoderResult[], failure: AdapterError): void {
  const { code, unlinked } = failure
  const gone = code === 'FEATURES_GONE' || code === 'KV_GONE' || (code === 'REFUSED' && prefill === undefined)
  if (!gone && againAfter(failure, 'decode') !== 'no') avoidNode(exchange, node.id, failure, 'decode')
  blameProducer(exchange, failure, prefill === undefined ? 'encode' : 'prefill')
  // Only P knows why its KV blocks are gone; it may be gone itself.
  if (code === 'KV_GONE' && prefill !== undefined) exchange.avoided.add(prefill.id)
  if (!unlinked) return
  const producers = prefill === undefined ? features.map(feature => feature.node) : [prefill.id]
  for (const producer of new Set(producers)) exchange.core.registry.linkLost(producer, node.id)
}

/** No plan is possible. */
export function refusalError ({ refused, reason, param }: Refusal, model: string): Error {
  if (refused === 'EPD_ERR_CONTEXT_LENGTH') return epdError(refused, [model, reason], { param })
  if (refused === 'EPD_ERR_NO_HYBRID') return epdError(refused, [reason, model], { param })
  return epdError(refused, [model], refused === 'EPD_ERR_MODEL_NOT_FOUND' ? { param: 'model' } : { cause: new Error(reason) })
}
