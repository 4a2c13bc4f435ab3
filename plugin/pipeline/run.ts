import { Readable } from 'node:stream'
import { AdapterError, type EncoderResult } from '../../adapters/adapter.ts'
import { epdError } from '../errors.ts'
import { ownTokens, planRequest, promptTokens, roomFor, SMALL_BODY, viewRequest, visionTokens, workOf, type Plan } from '../planning/index.ts'
import { ATTR, SPAN } from '../../adapters/wire/semconv.ts'
import { encodeStage, mediaView } from './encode.ts'
import { Exchange } from './exchange.ts'
import { generateStage, type Generation } from './generate.ts'
import { prefillStage } from './prefill.ts'
import { recordDelivery, recordFailure } from './record.ts'
import { endLive, finalError, refusalError, startAgain } from './setback.ts'
import type { Delivery } from './answer-stream.ts'
import type { Core, Deliver, GatewayRequest } from './types.ts'

const NO_FEATURES: readonly EncoderResult[] = []

/** How a request ended whose answer had begun, or `error` when nothing had reached the client. */
export interface Served {
  readonly delivery?: Delivery
  /** The last one. */
  readonly plan?: Plan | undefined
  readonly encodedBy?: readonly string[]
  readonly error?: unknown
  /** x-epd-* headers, for the error answer. */
  readonly headers: Record<string, string>
  readonly traceId?: string | undefined
}

/**
 * Serves one request: plan, encode, prefill, generate, deliver. Never rejects: what went wrong before the client got
 * anything is in `error`. Starts again at the plan when a node failed under it, before the first byte only.
 */
export async function serve (core: Core, request: GatewayRequest, deliver: Deliver): Promise<Served> {
  if (core.requests.closing) return { error: epdError('EPD_ERR_CLOSING'), headers: {} }
  const exchange = new Exchange(core, request)
  const { traceId } = exchange.trace
  try {
    exchange.checkRing()
    if (request.body.media.length > 0) await exchange.enter(visionTokens(request.body))
    if (request.body.stream) exchange.keepAlive(live => { deliver(live, exchange.headers()) })
    const delivery = await deliverAnswer(exchange, await generateWithRetries(exchange), deliver)
    recordDelivery(exchange, delivery)
    return { delivery, plan: exchange.plan, encodedBy: exchange.encodedBy, headers: {}, traceId }
  } catch (err) {
    const error = exchange.cancelled ?? finalError(exchange, err)
    recordFailure(exchange, error)
    const { plan, encodedBy } = exchange
    if (exchange.live !== undefined) return { delivery: await endLive(exchange.live, exchange, error), plan, encodedBy, headers: {}, traceId }
    return { error, plan, encodedBy, headers: exchange.headers(), traceId }
  } finally {
    exchange.close()
  }
}

async function generateWithRetries (exchange: Exchange): Promise<Generation> {
  let lost: ReadonlySet<string> | undefined
  for (;;) {
    exchange.attempts++
    const { singleNode } = exchange
    try {
      return await attempt(exchange, lost)
    } catch (err) {
      lost = await startAgain(exchange, err, lost, singleNode)
    }
  }
}

/** From the plan to the first good event of the answer. @param lost encoders that must not be tried */
async function attempt (exchange: Exchange, lost: ReadonlySet<string> | undefined): Promise<Generation> {
  let plan = makePlan(exchange)
  if (exchange.request.body.media.length > 0 && (plan.prefill ?? plan.node).checkMedia) await exchange.checkMedia()
  const { core: { registry, timings }, request: { body } } = exchange
  // A node that has answered is not asked the same again: the answer stands.
  const answered = exchange.answered.get(plan.node.id) ?? exchange.answered.get(plan.prefill?.id ?? '')
  if (answered !== undefined) throw answered
  exchange.timing = body.media.length === 0 ? undefined : timings.begin(plan, body)
  // Nodes whose turn comes later count as in use from the plan on, so that other requests see it.
  const reserved = {
    prefill: plan.prefill === undefined ? undefined : registry.reserve(plan.prefill.id, promptTokens(exchange.request.body)),
    node: registry.reserve(plan.node.id, plan.prefill === undefined ? ownTokens(plan, exchange.request.body) : 0, workOf(exchange.request.body))
  }
  const calling = plan.callsEncoders ? exchange.core.callers.add(exchange) : undefined
  try {
    let features = NO_FEATURES
    if (body.media.length > 0) ({ plan, features } = await encodeStage(exchange, plan, lost))
    reserved.prefill?.()
    const handoff = plan.prefill === undefined ? undefined : await prefillStage(exchange, plan, features)
    reserved.node()
    return await generateStage(exchange, plan, features, handoff)
  } finally {
    reserved.prefill?.()
    reserved.node()
    calling?.()
  }
}

function makePlan (exchange: Exchange): Plan {
  const { core: { options, registry }, request: { body, bypass = options.bypass, headers, path } } = exchange
  const span = exchange.trace.begin(SPAN.plan, { [ATTR.attempt]: exchange.attempts })
  exchange.encodedBy = []
  const view = viewRequest(body, path, headers, exchange.singleNode)
  const snapshot = body.bytes.length > SMALL_BODY ? roomFor(body, path, registry.snapshot()) : registry.snapshot()
  const plan = 'refused' in snapshot ? snapshot : planRequest(body.media.length === 0 ? view : Object.assign(view, mediaView(exchange)), snapshot, { bypass, routing: options.routing }, exchange.avoided)
  if ('refused' in plan) {
    const error = refusalError(plan, body.model)
    span.end({ error })
    throw error
  }
  exchange.plan = plan
  span.set({ [ATTR.topology]: plan.topology, [ATTR.reason]: plan.reason, [ATTR.node]: plan.node.id })
  span.end()
  return plan
}

async function deliverAnswer (exchange: Exchange, { answer, end }: Generation, deliver: Deliver): Promise<Delivery> {
  // It may have dropped the gateway's addresses from its list.
  if (exchange.plan?.callsEncoders === true && exchange.encodedBy.length === 0) exchange.plan = { ...exchange.plan, topology: 'hybrid', reason: 'the language model called no encoder' }
  const { live } = exchange
  exchange.endKeepAlive()
  try {
    if (live === undefined) deliver(answer, exchange.headers())
    else live.follow(answer)
  } catch (err) {
    if (answer.body instanceof Readable) answer.body.destroy()
    end(new DOMException('the answer was not sent', 'AbortError'))
    throw err
  }
  let delivery = await (live ?? answer).delivered
  // The client's leaving ends the call at the node, and may show there first.
  if (exchange.clientGone && delivery.outcome !== 'complete') delivery = { ...delivery, outcome: 'client_gone', error: undefined }
  if (delivery.outcome === 'complete') exchange.held?.forgetFeatures()
  end(delivery.outcome === 'complete' ? undefined : new AdapterError('UNAVAILABLE', 'the answer broke off', { node: exchange.plan!.node.id, cause: delivery.error, how: delivery.how }), delivery)
  return delivery
}
