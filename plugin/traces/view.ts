import { ATTR } from '../../adapters/wire/semconv.ts'
import type { AttributeValue, SpanKindName, StoredSpan } from './span.ts'

export type TraceStatus = 'ok' | 'error' | 'aborted'

export interface TraceSummary {
  readonly traceId: string
  /** Name of the request's own span; without one, of the topmost span. */
  readonly name: string
  readonly model: string | undefined
  readonly plan: string | undefined
  readonly reason: string | undefined
  readonly status: TraceStatus
  /** ISO 8601. */
  readonly start: string
  readonly durationMs: number
  readonly spans: number
  /** The request's own span is missing: the request is still running, or was not sampled here. */
  readonly partial: boolean
  readonly items: number
  /** Engine ids of the encoders, in item order. */
  readonly encoders: readonly string[]
  readonly inputTokens: number | undefined
  readonly outputTokens: number | undefined
}

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

export interface TraceFilter {
  readonly model?: string | undefined
  readonly plan?: string | undefined
  readonly status?: TraceStatus | undefined
  readonly minDurationMs?: number | undefined
  /** @default 50 */
  readonly limit?: number | undefined
}

export function matches (summary: TraceSummary, filter: TraceFilter): boolean {
  return (filter.model === undefined || summary.model === filter.model) &&
    (filter.plan === undefined || summary.plan === filter.plan) &&
    (filter.status === undefined || summary.status === filter.status) &&
    (filter.minDurationMs === undefined || summary.durationMs >= filter.minDurationMs)
}

/** @param spans at least one, in any order */
export function summarise (traceId: string, spans: readonly StoredSpan[]): TraceSummary {
  const request = spans.find(span => span.attributes[ATTR.operation] !== undefined)
  const { name, status, attributes } = request ?? topmost(spans)
  const { startTime, endTime } = request ?? extent(spans)
  return {
    traceId,
    name,
    model: text(attributes[ATTR.requestModel]),
    plan: text(attributes[ATTR.topology]),
    reason: text(attributes[ATTR.reason]),
    status: status === 'error' ? 'error' : attributes[ATTR.aborted] === true ? 'aborted' : 'ok',
    start: iso(startTime),
    durationMs: millis(startTime, endTime),
    spans: spans.length,
    partial: request === undefined,
    items: number(attributes[ATTR.items]) ?? 0,
    encoders: texts(attributes[ATTR.encoders]),
    inputTokens: number(attributes[ATTR.inputTokens]),
    outputTokens: number(attributes[ATTR.outputTokens])
  }
}

/** A span whose parent is not here. */
function topmost (spans: readonly StoredSpan[]): StoredSpan {
  const ids = new Set(spans.map(span => span.spanId))
  return spans.find(span => span.parentSpanId === undefined || !ids.has(span.parentSpanId)) ?? spans[0]!
}

/** From the first start to the last end. */
function extent (spans: readonly StoredSpan[]): Pick<StoredSpan, 'startTime' | 'endTime'> {
  let startTime: StoredSpan['startTime'] = [Infinity, 0]
  let endTime: StoredSpan['endTime'] = [0, 0]
  for (const span of spans) {
    if (compare(span.startTime, startTime) < 0) startTime = span.startTime
    if (compare(span.endTime, endTime) > 0) endTime = span.endTime
  }
  return { startTime, endTime }
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

function compare (a: StoredSpan['startTime'], b: StoredSpan['startTime']): number {
  return a[0] - b[0] || a[1] - b[1]
}

/** To the microsecond. */
function millis (from: StoredSpan['startTime'], to: StoredSpan['startTime']): number {
  return Math.round((to[0] - from[0]) * 1e6 + (to[1] - from[1]) / 1e3) / 1e3
}

function iso ([seconds, nanoseconds]: StoredSpan['startTime']): string {
  return `${new Date(seconds * 1_000).toISOString().slice(0, 19)}.${String(Math.floor(nanoseconds / 1_000)).padStart(6, '0')}Z`
}

function text (value: AttributeValue | undefined): string | undefined {
  return typeof value === 'string' ? value : undefined
}

function texts (value: AttributeValue | undefined): string[] {
  return Array.isArray(value) ? value.filter((one): one is string => typeof one === 'string') : []
}

function number (value: AttributeValue | undefined): number | undefined {
  return typeof value === 'number' ? value : undefined
}
