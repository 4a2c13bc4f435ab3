/** What is recorded of a request when it has ended: counts, metrics, its span. */
import type { Attributes } from '@opentelemetry/api'
import { AdapterError } from '../../adapters/adapter.ts'
import { epdError, isRefusal, toEpdError, toReply } from '../errors.ts'
import { ATTR } from '../../adapters/wire/semconv.ts'
import type { Exchange } from './exchange.ts'
import type { Delivery } from './answer-stream.ts'

/** The answer had begun. */
export function recordDelivery (exchange: Exchange, delivery: Delivery): void {
  const { trace, core, plan } = exchange
  const { outcome, statusCode, error } = delivery
  const aborted = outcome === 'client_gone'
  core.stats.count(plan?.topology ?? 'none', aborted ? 'aborted' : outcome === 'complete' ? 'ok' : 'error')
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
  core.stats.count(plan?.topology ?? 'none', aborted ? 'aborted' : isRefusal(error) ? 'refused' : 'error')
  measure(exchange, aborted ? undefined : errorTypeOf(error))
  if (trace.recording) trace.set({ ...planAttributes(exchange), [ATTR.statusCode]: aborted ? undefined : toReply(error).statusCode })
  trace.end(aborted ? { aborted } : { error })
}

function errorTypeOf (error: unknown): string {
  if (AdapterError.is(error) && error.response !== undefined) return String(error.response.statusCode)
  return toEpdError(error).code
}

function measure ({ core, plan, operation, request, startedAt }: Exchange, errorType: string | undefined, delivery?: Delivery): void {
  const now = performance.now()
  const since = request.arrivedAt ?? startedAt
  const firstByteAt = delivery?.firstByteAt
  const streamed = request.body.stream && firstByteAt !== undefined && errorType === undefined
  const tokens = streamed ? delivery?.closing().usage?.completionTokens ?? 0 : 0
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
