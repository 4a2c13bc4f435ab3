import { ATTR } from './semconv.ts'

export type AttributeValue = string | number | boolean | ReadonlyArray<string | number | boolean | null | undefined>
export type SpanKindName = 'internal' | 'server' | 'client' | 'producer' | 'consumer'

/** A finished span, of the gateway or of an engine. */
export interface StoredSpan {
  /** 32 and 16 hex digits. */
  readonly traceId: string
  readonly spanId: string
  readonly parentSpanId: string | undefined
  readonly name: string
  readonly kind: SpanKindName
  /** Unix time: whole seconds and the nanoseconds beyond them. */
  readonly start: readonly [seconds: number, nanoseconds: number]
  readonly end: readonly [seconds: number, nanoseconds: number]
  readonly attributes: Readonly<Record<string, AttributeValue | undefined>>
  readonly status: 'unset' | 'ok' | 'error'
  /** Description of the error. */
  readonly message?: string | undefined
  /** service.name and service.instance.id: for an engine, its engine id. */
  readonly service: string
  readonly instance?: string | undefined
  /** Heap bytes it takes, where it knows that better than an estimate would. */
  readonly bytes?: number
}

export type TraceStatus = 'ok' | 'error' | 'aborted'

export interface TraceSummary {
  readonly traceId: string
  /** Name of the request's own span; of the first span when the gateway's has not come (yet). */
  readonly name: string
  readonly model: string | undefined
  readonly plan: string | undefined
  readonly reason: string | undefined
  readonly status: TraceStatus
  /** ISO 8601. */
  readonly start: string
  readonly durationMs: number
  readonly spans: number
  /** The request's own span has not come: it is still running, or was never sampled here. */
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

export interface TraceStoreOptions {
  /** @default 1000 */
  readonly maxTraces?: number
  /** Estimated heap bytes of all spans. @default 16 MiB */
  readonly maxBytes?: number
}

/** A list, as a trace has a dozen spans: looking through it is cheaper than a map for each trace. */
interface Trace { readonly spans: StoredSpan[], bytes: number }

const DEFAULT_MAX_TRACES = 1_000
const DEFAULT_MAX_BYTES = 16 * 1024 * 1024
const DEFAULT_LIMIT = 50
/** A trace that grows beyond this is a client reusing one trace id for everything. */
const MAX_SPANS_PER_TRACE = 512
/** A span object with its maps and times, measured on Node 20, without the text it holds. */
const SPAN_BYTES = 600
const ATTRIBUTE_BYTES = 32
/** Of a trace itself: its place in the map, its list. */
const TRACE_BYTES = 300

/**
 * The last traces, in memory: bounded by number and by bytes, the oldest leave first. Spans of one trace come from
 * several processes in any order and are joined by trace id; one that comes twice is kept once.
 */
export class TraceStore {
  readonly #traces = new Map<string, Trace>()
  /** From the oldest on. Kept from one eviction to the next: each new one would step over all that have left before. */
  #oldest = this.#traces.keys()
  readonly #maxTraces: number
  readonly #maxBytes: number
  readonly #watchers = new Set<(span: StoredSpan) => void>()
  #bytes = 0

  constructor (options: TraceStoreOptions = {}) {
    this.#maxTraces = options.maxTraces ?? DEFAULT_MAX_TRACES
    this.#maxBytes = options.maxBytes ?? DEFAULT_MAX_BYTES
  }

  get size (): number { return this.#traces.size }
  /** Estimated heap bytes. */
  get bytes (): number { return this.#bytes }

  /** False when it was there already, or its trace has too many. */
  add (span: StoredSpan): boolean {
    let trace = this.#traces.get(span.traceId)
    if (trace === undefined) {
      trace = { spans: [], bytes: TRACE_BYTES }
      this.#traces.set(span.traceId, trace)
      this.#bytes += TRACE_BYTES
    }
    if (trace.spans.length >= MAX_SPANS_PER_TRACE || trace.spans.some(({ spanId }) => spanId === span.spanId)) return false
    const bytes = sizeOf(span)
    trace.spans.push(span)
    trace.bytes += bytes
    this.#bytes += bytes
    if (this.#traces.size > this.#maxTraces || this.#bytes > this.#maxBytes) this.#evict()
    for (const tell of this.#watchers) tell(span)
    return true
  }

  /** Newest first. */
  list (filter: TraceFilter = {}): TraceSummary[] {
    const limit = filter.limit ?? DEFAULT_LIMIT
    const found: TraceSummary[] = []
    // Keys alone are cheap to turn around; most lists end after a few of them.
    const ids = [...this.#traces.keys()]
    for (let i = ids.length - 1; i >= 0 && found.length < limit; i--) {
      const summary = summarise(ids[i]!, this.#traces.get(ids[i]!)!)
      if (matches(summary, filter)) found.push(summary)
    }
    return found
  }

  get (traceId: string): TraceView | undefined {
    const trace = this.#traces.get(traceId)
    if (trace === undefined) return undefined
    const spans = [...trace.spans].sort((a, b) => compare(a.start, b.start) || compare(b.end, a.end))
    const zero = spans[0]!.start
    return { ...summarise(traceId, trace), spans: spans.map(span => view(span, zero)) }
  }

  /** Spans of the last so many traces. */
  * lastSpans (traces: number): Iterable<StoredSpan> {
    let skip = this.#traces.size - traces
    for (const { spans } of this.#traces.values()) if (skip-- <= 0) yield * spans
  }

  /** Told of each span that is added. Call what it returns to end that. */
  watch (listener: (span: StoredSpan) => void): () => void {
    this.#watchers.add(listener)
    return () => { this.#watchers.delete(listener) }
  }

  clear (): void {
    this.#traces.clear()
    this.#oldest = this.#traces.keys()
    this.#bytes = 0
  }

  #evict (): void {
    while (this.#traces.size > this.#maxTraces || this.#bytes > this.#maxBytes) {
      const { value: traceId, done } = this.#oldest.next()
      if (done === true) {
        // It had come to the end, and is of no use after that.
        if (this.#traces.size === 0) return
        this.#oldest = this.#traces.keys()
        continue
      }
      this.#bytes -= this.#traces.get(traceId)!.bytes
      this.#traces.delete(traceId)
    }
  }
}

/** An estimate is enough for a bound: text at two bytes a character, the rest at what the objects were measured to take. */
function sizeOf (span: StoredSpan): number {
  if (span.bytes !== undefined) return span.bytes
  let bytes = SPAN_BYTES + 2 * (span.message?.length ?? 0)
  for (const key in span.attributes) {
    const value = span.attributes[key]
    bytes += ATTRIBUTE_BYTES
    if (typeof value === 'string') bytes += 2 * value.length
    else if (Array.isArray(value)) for (const item of value) bytes += typeof item === 'string' ? 16 + 2 * item.length : 8
  }
  return bytes
}

function matches (summary: TraceSummary, filter: TraceFilter): boolean {
  return (filter.model === undefined || summary.model === filter.model) &&
    (filter.plan === undefined || summary.plan === filter.plan) &&
    (filter.status === undefined || summary.status === filter.status) &&
    (filter.minDurationMs === undefined || summary.durationMs >= filter.minDurationMs)
}

function summarise (traceId: string, { spans }: Trace): TraceSummary {
  const root = rootOf(spans)
  let start = root.start
  let end = root.end
  if (root.attributes[ATTR.operation] === undefined) {
    for (const span of spans) {
      if (compare(span.start, start) < 0) start = span.start
      if (compare(span.end, end) > 0) end = span.end
    }
  }
  const aborted = root.attributes[ATTR.aborted] === true
  return {
    traceId,
    name: root.name,
    model: text(root.attributes[ATTR.requestModel]),
    plan: text(root.attributes[ATTR.topology]),
    reason: text(root.attributes[ATTR.reason]),
    status: root.status === 'error' ? 'error' : aborted ? 'aborted' : 'ok',
    start: iso(start),
    durationMs: millis(start, end),
    spans: spans.length,
    partial: root.attributes[ATTR.operation] === undefined,
    items: count(root.attributes[ATTR.items]) ?? 0,
    encoders: texts(root.attributes[ATTR.encoders]),
    inputTokens: count(root.attributes[ATTR.inputTokens]),
    outputTokens: count(root.attributes[ATTR.outputTokens])
  }
}

/** The request's own span says `gen_ai.operation.name`; failing that, one whose parent is not here. */
function rootOf (spans: readonly StoredSpan[]): StoredSpan {
  const own = spans.find(span => span.kind === 'client' && span.attributes[ATTR.operation] !== undefined)
  if (own !== undefined) return own
  const ids = new Set(spans.map(span => span.spanId))
  return spans.find(span => span.parentSpanId === undefined || !ids.has(span.parentSpanId)) ?? spans[0]!
}

function view (span: StoredSpan, zero: StoredSpan['start']): SpanView {
  return {
    traceId: span.traceId,
    spanId: span.spanId,
    parentSpanId: span.parentSpanId ?? null,
    name: span.name,
    kind: span.kind,
    start: iso(span.start),
    end: iso(span.end),
    offsetMs: millis(zero, span.start),
    durationMs: millis(span.start, span.end),
    attributes: span.attributes,
    status: span.message === undefined ? { code: span.status } : { code: span.status, message: span.message },
    service: span.service,
    instance: span.instance ?? null
  }
}

function compare (a: StoredSpan['start'], b: StoredSpan['start']): number {
  return a[0] - b[0] || a[1] - b[1]
}

/** To the microsecond. */
function millis (from: StoredSpan['start'], to: StoredSpan['start']): number {
  return Math.round((to[0] - from[0]) * 1e6 + (to[1] - from[1]) / 1e3) / 1e3
}

function iso ([seconds, nanoseconds]: StoredSpan['start']): string {
  return `${new Date(seconds * 1_000).toISOString().slice(0, 19)}.${String(Math.floor(nanoseconds / 1_000)).padStart(6, '0')}Z`
}

function text (value: AttributeValue | undefined): string | undefined {
  return typeof value === 'string' ? value : undefined
}

function texts (value: AttributeValue | undefined): string[] {
  return Array.isArray(value) ? value.filter((one): one is string => typeof one === 'string') : []
}

function count (value: AttributeValue | undefined): number | undefined {
  return typeof value === 'number' ? value : undefined
}
