import type { AttributeValue, SpanKindName, StoredSpan } from './span.ts'
import { compare, iso, millis, summarise, type TraceSummary } from './summary.ts'

export interface SpanView {
  readonly traceId: string
  readonly spanId: string
  readonly parentSpanId: string | null
  readonly name: string
  readonly kind: SpanKindName
  /** ISO 8601 with microseconds. */
  readonly start: string
  readonly end: string
  /** Milliseconds after the trace's first span began. */
  readonly offsetMs: number
  readonly durationMs: number
  readonly attributes: Readonly<Record<string, AttributeValue | undefined>>
  readonly status: { readonly code: StoredSpan['status'], readonly message?: string }
  readonly service: string
  readonly instance: string | null
}

export interface TraceView extends Omit<TraceSummary, 'spans'> {
  /** In order of their start. */
  readonly spans: readonly SpanView[]
}

/** In order of their start, those that take longer first. */
export function viewTrace (traceId: string, spans: readonly StoredSpan[]): TraceView {
  const sorted = [...spans].sort((a, b) => compare(a.startTime, b.startTime) || compare(b.endTime, a.endTime))
  const zero = sorted[0]!.startTime
  return { ...summarise(traceId, spans), spans: sorted.map(span => view(span, zero)) }
}

function view (span: StoredSpan, zero: StoredSpan['startTime']): SpanView {
  return {
    traceId: span.traceId,
    spanId: span.spanId,
    parentSpanId: span.parentSpanId ?? null,
    name: span.name,
    kind: span.kind,
    start: iso(span.startTime),
    end: iso(span.endTime),
    offsetMs: millis(zero, span.startTime),
    // After the clock was set back, a span may end before it began.
    durationMs: Math.max(0, millis(span.startTime, span.endTime)),
    attributes: span.attributes,
    status: span.message === undefined ? { code: span.status } : { code: span.status, message: span.message },
    service: span.service,
    instance: span.instance ?? null
  }
}
