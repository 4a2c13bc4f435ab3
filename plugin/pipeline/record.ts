/** What is recorded of a request when it has ended: counts, metrics, its span. */
import type { Attributes } from '@opentelemetry/api'
import { AdapterError } from '../../adapters/adapter.ts'
import { epdError, isRefusal, toEpdError, toReply } from '../errors.ts'
import { ATTR, TRACER_NAME } from '../../adapters/wire/semconv.ts'
import type { Exchange } from './exchange.ts'
import type { Delivery } from './answer-stream.ts'

/** The answer had begun. */
export function recordDelivery (exchange: Exchange, delivery: Delivery): void {
  const { trace, core, plan } = exchange
  const { outcome, statusCode, error } = delivery
  const aborted = outcome === 'client_gone'
  core.stats.served.add(1, plan?.topology ?? 'none', aborted ? 'aborted' : outcome === 'complete' ? 'ok' : 'error')
  measure(exchange, outcome === 'upstream_failed' ? 'EPD_ERR_UPSTREAM_BROKEN' : statusCode >= 400 ? String(statusCode) : undefined, delivery)
  if (trace.recording) {
    trace.set(planAttributes(exchange))
    trace.set(answerAttributes(exchange, delivery))
  }
  if (aborted) trace.end({ aborted })
  else trace.end(outcome === 'complete' ? {} : { error: epdError('EPD_ERR_UPSTREAM_BROKEN', [], { cause: error }) })
}

/** Nothing had reached the client. */
export function recordFailure (exchange: Exchange, error: unknown): void {
  const { trace, core, plan } = exchange
  const aborted = exchange.clientGone
  core.stats.served.add(1, plan?.topology ?? 'none', aborted ? 'aborted' : isRefusal(error) ? 'refused' : 'error')
  measure(exchange, aborted ? undefined : errorTypeOf(error))
  if (trace.recording) trace.set({ ...planAttributes(exchange), [ATTR.statusCode]: aborted ? undefined : toReply(error).statusCode })
  trace.end(aborted ? { aborted } : { error })
}

function errorTypeOf (error: unknown): string {
  if (AdapterError.is(error) && error.response !== undefined) return String(error.response.statusCode)
  return toEpdError(error).code
}

function measure ({ core: { metrics, stats }, plan, operation, request, startedAt, trace }: Exchange, errorType: string | undefined, delivery?: Delivery): void {
  const now = performance.now()
  const since = request.arrivedAt ?? startedAt
  const topology = plan?.topology ?? 'none'
  const model = plan === undefined ? undefined : request.body.model
  const labels = [operation, TRACER_NAME, model, topology, errorType]
  const traceId = trace.recording ? trace.traceId : undefined
  metrics.durations.record((now - since) / 1_000, labels, traceId)
  stats.requestBytes.add(request.body.bytes.length, topology)
  if (delivery === undefined) return
  stats.answerBytes.add(delivery.bytes, topology)
  if (errorType !== undefined || model === undefined) return
  const { promptTokens, completionTokens } = delivery.closing().usage ?? {}
  if (promptTokens !== undefined) metrics.tokens.record(promptTokens, [operation, TRACER_NAME, model, 'input'])
  if (completionTokens !== undefined) metrics.tokens.record(completionTokens, [operation, TRACER_NAME, model, 'output'])
  const { firstByteAt } = delivery
  if (!request.body.stream || firstByteAt === undefined) return
  const first = (firstByteAt - since) / 1_000
  metrics.firstTokens.record(first, labels, traceId)
  metrics.firstChunks.record(first, labels, traceId)
  if (completionTokens !== undefined && completionTokens > 1) metrics.perTokens.record((now - firstByteAt) / 1_000 / (completionTokens - 1), labels, traceId)
}

/** Telemetry leaves out what is undefined. */
function planAttributes ({ plan, attempts, encodedBy }: Exchange): Attributes {
  return {
    [ATTR.topology]: plan?.topology,
    [ATTR.reason]: plan?.reason,
    [ATTR.encoders]: encodedBy.length === 0 ? undefined : [...encodedBy],
    [ATTR.retries]: attempts > 1 ? attempts - 1 : undefined
  }
}

function answerAttributes ({ request, startedAt }: Exchange, { statusCode, firstByteAt, closing }: Delivery): Attributes {
  const { usage, finishReason } = closing()
  return {
    [ATTR.statusCode]: statusCode,
    [ATTR.timeToFirstChunk]: firstByteAt === undefined || !request.body.stream ? undefined : (firstByteAt - (request.arrivedAt ?? startedAt)) / 1_000,
    [ATTR.finishReasons]: finishReason === undefined ? undefined : [finishReason],
    [ATTR.inputTokens]: usage?.promptTokens,
    [ATTR.outputTokens]: usage?.completionTokens,
    [ATTR.cacheReadTokens]: usage?.cachedTokens
  }
}
