import { SpanStatusCode } from '@opentelemetry/api'
import type { ReadableSpan, SpanProcessor } from '@opentelemetry/sdk-trace-node'
import { ATTR, TRACER_NAME } from '../../adapters/wire/semconv.ts'
import { SPAN_KINDS, type AttributeValue, type StoredSpan } from './span.ts'
import type { TraceStore } from './store.ts'

/**
 * Puts ended spans into a trace store. The gateway hands it its own spans, whichever provider made them. Given to an
 * application's SDK too, it adds the application's spans to the traces that the gateway's requests are in, and leaves
 * all other traces out.
 */
export class EpdSpanProcessor implements SpanProcessor {
  readonly #store: TraceStore

  constructor (store: TraceStore) {
    this.#store = store
  }

  onStart (): void {}

  onEnd (span: ReadableSpan): void {
    if (span.instrumentationScope.name === TRACER_NAME || this.#store.has(span.spanContext().traceId)) this.#store.add(storedSpan(span))
  }

  async forceFlush (): Promise<void> {}
  async shutdown (): Promise<void> {}
}

function storedSpan (span: ReadableSpan): StoredSpan {
  const { traceId, spanId } = span.spanContext()
  const { [ATTR.serviceName]: service, [ATTR.serviceInstance]: instance } = span.resource.attributes
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
    service: typeof service === 'string' ? service : TRACER_NAME,
    instance: typeof instance === 'string' ? instance : undefined
  }
}
