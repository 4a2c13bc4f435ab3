import { SpanStatusCode } from '@opentelemetry/api'
import type { Resource } from '@opentelemetry/resources'
import type { ReadableSpan, SpanProcessor } from '@opentelemetry/sdk-trace-node'
import { ATTR, TRACER_NAME } from '../../adapters/wire/semconv.ts'
import { SPAN_KINDS, type AttributeValue, type SpanOrigin, type StoredSpan } from '../traces/stored-span.ts'
import type { TraceStore } from '../traces/trace-store.ts'

interface Origin extends SpanOrigin { readonly resource: Resource }

/** A span processor that puts each ended span into the store at once: nothing is batched, as nothing is sent. */
export function storeProcessor (store: TraceStore): SpanProcessor {
  let last: Origin | undefined
  // One process has one resource.
  const originOf = (resource: Resource): Origin => {
    if (last?.resource !== resource) last = { resource, ...originOfResource(resource) }
    return last
  }
  return {
    onStart () {},
    onEnd (span) { store.add(stored(span, originOf(span.resource))) },
    async forceFlush () {},
    async shutdown () {}
  }
}

/** What a resource says of its process. */
export function originOfResource ({ attributes }: Resource): SpanOrigin {
  const { [ATTR.serviceName]: service, [ATTR.serviceInstance]: instance } = attributes
  return { service: String(service ?? TRACER_NAME), instance: typeof instance === 'string' ? instance : undefined }
}

function stored (span: ReadableSpan, { service, instance }: Origin): StoredSpan {
  const { traceId, spanId } = span.spanContext()
  return {
    traceId,
    spanId,
    parentSpanId: span.parentSpanContext?.spanId,
    name: span.name,
    kind: SPAN_KINDS[span.kind],
    startTime: span.startTime,
    endTime: span.endTime,
    attributes: span.attributes as Record<string, AttributeValue | undefined>,
    status: span.status.code === SpanStatusCode.ERROR ? 'error' : span.status.code === SpanStatusCode.OK ? 'ok' : 'unset',
    message: span.status.message,
    service,
    instance
  }
}
