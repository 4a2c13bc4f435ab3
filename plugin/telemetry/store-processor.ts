import { SpanKind, SpanStatusCode } from '@opentelemetry/api'
import type { Resource } from '@opentelemetry/resources'
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

interface Origin { readonly resource: Resource, readonly service: string, readonly instance: string | undefined }

/** A span processor that puts each ended span into the store at once: nothing is batched, as nothing is sent. */
export function storeProcessor (store: TraceStore): SpanProcessor {
  let last: Origin | undefined
  // One process has one resource.
  const originOf = (resource: Resource): Origin => {
    if (last?.resource !== resource) last = origin(resource)
    return last
  }
  return {
    onStart () {},
    onEnd (span) { store.add(stored(span, originOf(span.resource))) },
    async forceFlush () {},
    async shutdown () {}
  }
}

function origin (resource: Resource): Origin {
  const { [ATTR.serviceName]: service, [ATTR.serviceInstance]: instance } = resource.attributes
  return { resource, service: String(service ?? TRACER_NAME), instance: typeof instance === 'string' ? instance : undefined }
}

function stored (span: ReadableSpan, { service, instance }: Origin): StoredSpan {
  const { traceId, spanId } = span.spanContext()
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
    service,
    instance
  }
}
