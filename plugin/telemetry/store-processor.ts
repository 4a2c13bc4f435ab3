import { SpanKind, SpanStatusCode } from '@opentelemetry/api'
import type { ReadableSpan, SpanProcessor } from '@opentelemetry/sdk-trace-node'
import { ATTR, TRACER_NAME } from './semconv.ts'
import type { AttributeValue, SpanKindName, StoredSpan, TraceStore } from './trace-store.ts'

const KINDS: Readonly<Record<SpanKind, SpanKindName>> = {
  [SpanKind.INTERNAL]: 'internal',
  [SpanKind.SERVER]: 'server',
  [SpanKind.CLIENT]: 'client',
  [SpanKind.PRODUCER]: 'producer',
  [SpanKind.CONSUMER]: 'consumer'
}

/** A span processor that puts each ended span into the store at once: nothing is batched, as nothing is sent. */
export function storeProcessor (store: TraceStore): SpanProcessor {
  return {
    onStart () {},
    onEnd (span) { store.add(stored(span)) },
    async forceFlush () {},
    async shutdown () {}
  }
}

function stored (span: ReadableSpan): StoredSpan {
  const { traceId, spanId } = span.spanContext()
  const { attributes: resource } = span.resource
  const instance = resource[ATTR.serviceInstance]
  return {
    traceId,
    spanId,
    parentSpanId: span.parentSpanContext?.spanId,
    name: span.name,
    kind: KINDS[span.kind],
    start: span.startTime,
    end: span.endTime,
    attributes: span.attributes as Record<string, AttributeValue | undefined>,
    status: span.status.code === SpanStatusCode.ERROR ? 'error' : span.status.code === SpanStatusCode.OK ? 'ok' : 'unset',
    message: span.status.message,
    service: String(resource[ATTR.serviceName] ?? TRACER_NAME),
    instance: typeof instance === 'string' ? instance : undefined
  }
}
