import type { Attributes } from '@opentelemetry/api'
import { AdapterError, type EncoderResult } from '../../adapters/adapter.ts'
import { epdError, isRefusal, toEpdError } from '../errors.ts'
import { planRequest, promptTokens, viewRequest, type Plan, type Refusal } from '../planning/index.ts'
import { ATTR, SPAN } from '../../adapters/wire/semconv.ts'
import { encodeStage, EncodersExhausted, exhaustedError } from './encode.ts'
import { Exchange } from './exchange.ts'
import { generateStage, visionTokens, type Generation } from './generate.ts'
import { prefillStage } from './prefill.ts'
import type { Core, Deliver, Delivery, GatewayRequest } from './types.ts'

const NO_FEATURES: readonly EncoderResult[] = []

/** How a request ended whose answer had begun, or `error` when nothing had reached the client. */
export interface Served {
  readonly delivery?: Delivery
  readonly error?: unknown
  /** x-epd-* headers, for the error answer. */
  readonly headers: Record<string, string>
  readonly traceId?: string | undefined
}

/**
 * Serves one request: plan, encode, prefill, generate, deliver. Never rejects: what went wrong before the client got anything is
 * in `error`. Starts again at the plan when a node failed under it, before the first byte only.
 */
export async function serve (core: Core, request: GatewayRequest, deliver: Deliver): Promise<Served> {
  const exchange = new Exchange(core, request)
  try {
    if (request.body.media.length > 0) await exchange.enter(visionTokens(exchange))
    const delivery = await attempts(exchange, deliver)
    finish(exchange, delivery)
    return { delivery, headers: {}, traceId: exchange.trace.traceId }
  } catch (err) {
    const error = exchange.cancelled ?? err
    fail(exchange, error)
    return { error, headers: exchange.headers(), traceId: exchange.trace.traceId }
  } finally {
    exchange.close()
  }
}

async function attempts (exchange: Exchange, deliver: Deliver): Promise<Delivery> {
  for (;;) {
    exchange.attempts++
    const { singleNode } = exchange
    try {
      return await attempt(exchange, deliver)
    } catch (err) {
      exchange.releaseLeases()
      if (!mayRetry(exchange, err, singleNode)) throw err
      exchange.core.stats.retries++
      exchange.log.warn({ err }, 'attempt failed before the first byte; starting again at the plan')
    }
  }
}

/** @param before was it known when the attempt began that two nodes can't share the request? To find out is no failure, and costs no retry. */
function mayRetry (exchange: Exchange, err: unknown, before: unknown): boolean {
  if (exchange.cancelled !== undefined || performance.now() >= exchange.deadline || !AdapterError.is(err)) return false
  if (err.singleNode && before === undefined) return true
  if (exchange.attempts > exchange.core.options.retries || err.code === 'REJECTED') return false
  // Two nodes that can't work together are not planned together again.
  return err.code !== 'REFUSED' || exchange.plan?.prefill !== undefined
}

async function attempt (exchange: Exchange, deliver: Deliver): Promise<Delivery> {
  const { plan, generation } = await begin(exchange)
  let delivery: Delivery
  try {
    delivery = await deliver(generation.upstream, exchange.headers())
  } catch (err) {
    if ((err as { code?: unknown }).code === 'client_closed') exchange.cancel(epdError('EPD_ERR_CLIENT_CLOSED_REQUEST', [], { cause: err }))
    const error = exchange.cancelled ?? (AdapterError.is(err) ? err : new AdapterError('UNAVAILABLE', 'the answer broke off before it began', { node: plan.node.id, cause: err }))
    if (AdapterError.is(error)) exchange.avoid(plan.node.id)
    generation.end(error)
    throw error
  }
  if (delivery.outcome === 'complete') exchange.forgetLeases()
  generation.end(delivery.outcome === 'complete' ? undefined : brokenOff(plan, delivery), delivery)
  return delivery
}

/** All up to the first good event of the answer. */
async function begin (exchange: Exchange): Promise<{ plan: Plan, generation: Generation }> {
  const planned = makePlan(exchange)
  if (planned.order.length === 0 && planned.prefill === undefined) return { plan: planned, generation: await generateStage(exchange, planned, NO_FEATURES) }
  const free = reserve(exchange, planned)
  try {
    const { plan, features } = planned.order.length === 0 ? { plan: planned, features: NO_FEATURES } : await encodeOrFallBack(exchange, planned)
    free.prefill()
    const prefill = plan.prefill === undefined ? undefined : await prefillStage(exchange, plan, features)
    free.node()
    return { plan, generation: await generateStage(exchange, plan, features, prefill) }
  } finally {
    free.prefill()
    free.node()
  }
}

/** Nodes whose turn comes later are in use from the plan on, for others to see. */
function reserve ({ core: { registry }, request }: Exchange, { order, prefill, node }: Plan): { prefill (): void, node (): void } {
  return {
    prefill: prefill === undefined || order.length === 0 ? () => {} : registry.reserve(prefill.id, promptTokens(request.body)),
    node: registry.reserve(node.id)
  }
}

function brokenOff (plan: Plan, delivery: Delivery): AdapterError {
  return new AdapterError('UNAVAILABLE', 'the answer broke off', { node: plan.node.id, cause: delivery.error })
}

function makePlan (exchange: Exchange): Plan {
  const { trace } = exchange
  if (!trace.recording) return choosePlan(exchange)
  return trace.stageSync(SPAN.plan, { [ATTR.attempt]: exchange.attempts }, span => {
    const plan = choosePlan(exchange)
    span.set({ [ATTR.topology]: plan.topology, [ATTR.reason]: plan.reason, [ATTR.node]: plan.node.id })
    return plan
  })
}

function choosePlan (exchange: Exchange): Plan {
  const { core: { options, registry }, request: { body, bypass = options.bypass, path } } = exchange
  exchange.encodedBy = []
  const plan = planRequest(viewRequest(body, path, exchange.singleNode), registry.snapshot(), { bypass, routing: options.routing }, exchange.avoided)
  if ('refused' in plan) throw refusal(plan, body.model)
  exchange.plan = plan
  return plan
}

function refusal ({ refused, reason, param }: Refusal, model: string): Error {
  if (refused === 'EPD_ERR_NO_HYBRID') return epdError(refused, [reason, model], { param })
  return epdError(refused, [model], refused === 'EPD_ERR_MODEL_NOT_FOUND' ? { param: 'model' } : { cause: new Error(reason) })
}

async function encodeOrFallBack (exchange: Exchange, plan: Plan): Promise<{ plan: Plan, features: readonly EncoderResult[] }> {
  try {
    return { plan, features: await encodeStage(exchange, plan) }
  } catch (err) {
    if (exchange.cancelled !== undefined || !(err instanceof EncodersExhausted)) throw err
    if (!plan.fallback) throw exhaustedError(err)
    exchange.releaseLeases()
    exchange.core.stats.encodeFallbacks++
    const fallback: Plan = { ...plan, topology: plan.prefill === undefined ? 'hybrid' : 'p-d', reason: 'encoders failed', order: [] }
    exchange.plan = fallback
    return { plan: fallback, features: NO_FEATURES }
  }
}

function finish (exchange: Exchange, delivery: Delivery): void {
  const { trace, core, plan } = exchange
  const aborted = delivery.outcome === 'client_gone'
  core.stats.count(plan?.topology ?? 'none', aborted ? 'aborted' : delivery.outcome === 'complete' ? 'ok' : 'error')
  measure(exchange, delivery.outcome === 'upstream_failed' ? 'EPD_ERR_UPSTREAM_BROKEN' : delivery.statusCode >= 400 ? String(delivery.statusCode) : undefined, delivery)
  if (trace.recording) {
    trace.set(planAttributes(exchange))
    trace.set(answerAttributes(exchange, delivery))
  }
  if (aborted) trace.end({ aborted })
  else trace.end(delivery.outcome === 'complete' ? {} : { error: epdError('EPD_ERR_UPSTREAM_BROKEN', [], { cause: delivery.error }) })
}

function fail (exchange: Exchange, error: unknown): void {
  const { trace, core, plan } = exchange
  const aborted = exchange.cancelled === error && (error as { statusCode?: number }).statusCode === 499
  core.stats.count(plan?.topology ?? 'none', aborted ? 'aborted' : isRefusal(error) ? 'refused' : 'error')
  measure(exchange, aborted ? undefined : errorTypeOf(error))
  if (trace.recording) trace.set(planAttributes(exchange))
  trace.end(aborted ? { aborted } : { error })
}

function errorTypeOf (error: unknown): string {
  if (AdapterError.is(error) && error.code === 'REJECTED' && error.response !== undefined) return String(error.response.statusCode)
  return toEpdError(error).code
}

function measure ({ core, plan, operation, request, startedAt }: Exchange, errorType: string | undefined, delivery?: Delivery): void {
  const now = performance.now()
  const since = request.arrivedAt ?? startedAt
  const firstByteAt = delivery?.firstByteAt
  const streamed = request.body.stream && firstByteAt !== undefined && errorType === undefined
  // Reading the usage means looking through the end of the answer.
  const tokens = streamed ? delivery?.usage?.completionTokens ?? 0 : 0
  core.metrics.request({
    operation,
    model: plan === undefined ? undefined : request.body.model,
    topology: plan?.topology ?? 'none',
    seconds: (now - since) / 1_000,
    errorType,
    firstChunk: streamed ? (firstByteAt - since) / 1_000 : undefined,
    perToken: streamed && tokens > 1 ? (now - firstByteAt) / 1_000 / (tokens - 1) : undefined
  })
}

/** What is undefined is left out by setAttributes. One literal: spreads of parts made this the dearest line of a trace. */
function planAttributes ({ plan, attempts, encodedBy }: Exchange): Attributes {
  return {
    [ATTR.topology]: plan?.topology,
    [ATTR.reason]: plan?.reason,
    [ATTR.encoders]: encodedBy.length === 0 ? undefined : [...encodedBy],
    [ATTR.retries]: attempts > 1 ? attempts - 1 : undefined
  }
}

function answerAttributes ({ request, startedAt }: Exchange, { usage, statusCode, finishReason, firstByteAt }: Delivery): Attributes {
  return {
    [ATTR.statusCode]: statusCode,
    [ATTR.timeToFirstChunk]: firstByteAt === undefined || !request.body.stream ? undefined : (firstByteAt - (request.arrivedAt ?? startedAt)) / 1_000,
    [ATTR.finishReasons]: finishReason === undefined ? undefined : [finishReason],
    [ATTR.inputTokens]: usage?.promptTokens,
    [ATTR.outputTokens]: usage?.completionTokens,
    [ATTR.cacheReadTokens]: usage?.cachedTokens
  }
}
