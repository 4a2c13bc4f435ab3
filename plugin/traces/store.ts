import { SpanStatusCode } from '@opentelemetry/api'
import type { ReadableSpan, SpanProcessor } from '@opentelemetry/sdk-trace-node'
import { ATTR, TRACER_NAME } from '../../adapters/wire/semconv.ts'
import { SPAN_KINDS, type AttributeValue, type StoredSpan } from './span.ts'
import { matches, summarise, type TraceFilter, type TraceSummary } from './summary.ts'
import { viewTrace, type TraceView } from './view.ts'

export interface TraceStoreOptions {
  /** @default 1000 */
  readonly maxTraces?: number
  /** Memory of all spans as estimated, 64 KiB to 1 GiB. @default 16 MiB */
  readonly maxBytes?: number
}

interface Trace {
  /** By span id, in the order in which they came. */
  readonly spans: Map<string, StoredSpan>
  bytes: number
}

const DEFAULT_MAX_TRACES = 1_000
const DEFAULT_MAX_BYTES = 16 * 1024 * 1024
const [MIN_BYTES, MAX_BYTES] = [64 * 1024, 1024 ** 3]
const DEFAULT_LIMIT = 50
/** A trace that grows beyond this belongs to a client that reuses one trace id for everything. */
const MAX_SPANS_PER_TRACE = 512
const [MAX_TEXT, MAX_ARRAY] = [1_024, 64] as const
/** Estimates of heap memory, measured on Node 20: a trace with its maps; a span without its attributes; an attribute without its text. */
const [TRACE_BYTES, SPAN_BYTES, VALUE_BYTES] = [700, 500, 32] as const

/**
 * The last traces, in memory, bounded by number and by bytes. Spans of one trace come from several processes in any
 * order and are joined by trace id; a span that comes twice is kept once. The oldest complete trace leaves first, so
 * that a request that is still running keeps its first spans.
 */
export class TraceStore {
  /** In the order of their first span. */
  readonly #traces = new Map<string, Trace>()
  /** Ids of traces without the request's own span, which ends last. */
  readonly #incomplete = new Set<string>()
  readonly #maxTraces: number
  readonly #maxBytes: number
  readonly #watchers = new Set<(span: StoredSpan) => void>()
  #bytes = 0

  /** @throws RangeError when maxBytes is out of its bounds */
  constructor ({ maxTraces = DEFAULT_MAX_TRACES, maxBytes = DEFAULT_MAX_BYTES }: TraceStoreOptions = {}) {
    if (!(maxBytes >= MIN_BYTES && maxBytes <= MAX_BYTES)) throw new RangeError(`maxBytes must be ${MIN_BYTES} to ${MAX_BYTES}`)
    this.#maxTraces = maxTraces
    this.#maxBytes = maxBytes
  }

  get size (): number { return this.#traces.size }
  /** Memory of all spans, estimated. */
  get bytes (): number { return this.#bytes }

  has (traceId: string): boolean { return this.#traces.has(traceId) }

  /** @returns the span as it is kept, its texts cut; undefined when it was there already, or its trace has too many */
  add (span: StoredSpan): StoredSpan | undefined {
    const trace = this.#traces.get(span.traceId) ?? this.#begin(span.traceId)
    if (trace.spans.has(span.spanId) || trace.spans.size >= MAX_SPANS_PER_TRACE) return undefined
    const kept = cut(span)
    const bytes = bytesOf(kept)
    trace.spans.set(kept.spanId, kept)
    trace.bytes += bytes
    this.#bytes += bytes
    // Of the gateway's spans only that of a whole request has these attributes.
    if (kept.attributes[ATTR.operation] !== undefined && (kept.attributes[ATTR.provider] ?? TRACER_NAME) === TRACER_NAME) this.#incomplete.delete(kept.traceId)
    this.#evict()
    for (const notify of this.#watchers) notify(kept)
    return kept
  }

  /** Newest first. */
  list (filter: TraceFilter = {}): TraceSummary[] {
    const limit = filter.limit ?? DEFAULT_LIMIT
    const found: TraceSummary[] = []
    for (const [traceId, { spans }] of [...this.#traces].reverse()) {
      if (found.length >= limit) break
      const summary = summarise(traceId, [...spans.values()])
      if (matches(summary, filter)) found.push(summary)
    }
    return found
  }

  get (traceId: string): TraceView | undefined {
    const trace = this.#traces.get(traceId)
    return trace === undefined ? undefined : viewTrace(traceId, [...trace.spans.values()])
  }

  /** Spans of the last so many traces. */
  lastSpans (traces: number): StoredSpan[] {
    return [...this.#traces.values()].slice(-traces).flatMap(({ spans }) => [...spans.values()])
  }

  /**
   * @param listener gets each span that is added
   * @returns ends that
   */
  watch (listener: (span: StoredSpan) => void): () => void {
    this.#watchers.add(listener)
    return () => { this.#watchers.delete(listener) }
  }

  clear (): void {
    this.#traces.clear()
    this.#incomplete.clear()
    this.#bytes = 0
  }

  #begin (traceId: string): Trace {
    const trace: Trace = { spans: new Map(), bytes: TRACE_BYTES }
    this.#traces.set(traceId, trace)
    this.#incomplete.add(traceId)
    this.#bytes += TRACE_BYTES
    return trace
  }

  #evict (): void {
    while (this.#traces.size > this.#maxTraces || this.#bytes > this.#maxBytes) {
      const traceId = this.#next()
      if (traceId === undefined) return
      this.#bytes -= this.#traces.get(traceId)!.bytes
      this.#traces.delete(traceId)
      this.#incomplete.delete(traceId)
    }
  }

  /** Spans without a request would stay for ever: of traces that never complete, at most half of the store is kept. */
  #next (): string | undefined {
    if (2 * this.#incomplete.size <= this.#traces.size) {
      for (const traceId of this.#traces.keys()) if (!this.#incomplete.has(traceId)) return traceId
    }
    return this.#incomplete.values().next().value
  }
}

/** The span with texts and lists within bounds. Model names are the client's, and an engine's span may hold anything. */
function cut (span: StoredSpan): StoredSpan {
  const { name, message = '', service, instance = '', attributes } = span
  if (![name, message, service, instance].some(isLong) && !Object.values(attributes).some(isLong)) return span
  return {
    ...span,
    name: short(name),
    message: span.message === undefined ? undefined : short(message),
    service: short(service),
    instance: span.instance === undefined ? undefined : short(instance),
    attributes: Object.fromEntries(Object.entries(attributes).map(([key, value]) => [key, shortValue(value)]))
  }
}

function isLong (value: AttributeValue | undefined): boolean {
  if (typeof value === 'string') return value.length > MAX_TEXT
  return Array.isArray(value) && (value.length > MAX_ARRAY || value.some(isLong))
}

function shortValue (value: AttributeValue | undefined): AttributeValue | undefined {
  if (typeof value === 'string') return short(value)
  return Array.isArray(value) ? value.slice(0, MAX_ARRAY).map(one => typeof one === 'string' ? short(one) : one) : value
}

/** A copy: a slice would keep the whole text in memory. */
function short (text: string): string {
  return text.length <= MAX_TEXT ? text : Buffer.from(text.slice(0, MAX_TEXT)).toString()
}

function bytesOf ({ name, message = '', attributes }: StoredSpan): number {
  let bytes = SPAN_BYTES + 2 * (name.length + message.length)
  for (const key in attributes) bytes += VALUE_BYTES + key.length + sizeOf(attributes[key])
  return bytes
}

function sizeOf (value: AttributeValue | undefined): number {
  if (typeof value === 'string') return 2 * value.length
  let bytes = 0
  if (Array.isArray(value)) for (const one of value) bytes += VALUE_BYTES + (typeof one === 'string' ? 2 * one.length : 0)
  return bytes
}

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
