import { SpanStatusCode, type AttributeValue, type Attributes, type HrTime } from '@opentelemetry/api'
import type { ReadableSpan } from '@opentelemetry/sdk-trace-node'

/**
 * An OTLP/HTTP JSON export request without what is zero or empty: JSON leaves defaults out, and a gateway that takes
 * in the spans of every request reads half as much. Links and events are left out too: engines make none.
 */
export function spansToJson (spans: readonly ReadableSpan[]): string {
  const [first] = spans
  if (first === undefined) return '{"resourceSpans":[]}'
  const { name, version } = first.instrumentationScope
  const resource = { attributes: attributesOf(first.resource.attributes) }
  return JSON.stringify({ resourceSpans: [{ resource, scopeSpans: [{ scope: { name, version }, spans: spans.map(spanOf) }] }] })
}

function spanOf (span: ReadableSpan): object {
  const { traceId, spanId } = span.spanContext()
  const { code, message } = span.status
  return {
    traceId,
    spanId,
    parentSpanId: span.parentSpanContext?.spanId,
    name: span.name,
    // The API counts kinds from 0, the protocol keeps 0 for "unspecified".
    kind: span.kind + 1,
    startTimeUnixNano: nanos(span.startTime),
    endTimeUnixNano: nanos(span.endTime),
    attributes: attributesOf(span.attributes),
    status: code === SpanStatusCode.UNSET ? undefined : { code, message }
  }
}

function nanos ([seconds, nanoseconds]: HrTime): string {
  return `${seconds}${String(nanoseconds).padStart(9, '0')}`
}

function attributesOf (attributes: Attributes): object[] {
  return Object.entries(attributes).map(([key, value]) => ({ key, value: valueOf(value) }))
}

function valueOf (value: AttributeValue | null | undefined): object {
  if (typeof value === 'string') return { stringValue: value }
  if (typeof value === 'boolean') return { boolValue: value }
  if (typeof value === 'number') return Number.isInteger(value) ? { intValue: value } : { doubleValue: value }
  return Array.isArray(value) ? { arrayValue: { values: value.map(valueOf) } } : {}
}
