import { EntryLog, NOWHERE } from './entry-log.ts'
import { SentSpan } from './otlp-text.ts'
import type { SpanOrigin, StoredSpan } from './stored-span.ts'
import { unpackRecord, type TraceRecord } from './trace-record.ts'
import { matches, summarise, viewTrace, type TraceFilter, type TraceSummary, type TraceView } from './trace-view.ts'

export interface TraceStoreOptions {
  /** @default 1000 */
  readonly maxTraces?: number
  /** Memory of all spans, 64 KiB to 1 GiB. @default 16 MiB */
  readonly maxBytes?: number
}

/** Its spans are a chain of entries in the log, from the last one on, and those of records that are not written down yet. */
interface Trace {
  /** Nothing of it lies before. */
  readonly first: number
  last: number
  /** Spans in the log. */
  count: number
  open: TraceRecord[] | undefined
}

/** What an entry of the log is: a whole record; a span as JSON; a span as an engine sent it. */
const [RECORD, SPAN, SENT] = [0, 1, 2] as const
const DEFAULT_MAX_TRACES = 1_000
const DEFAULT_MAX_BYTES = 16 * 1024 * 1024
const [MIN_BYTES, MAX_BYTES] = [64 * 1024, 1024 ** 3]
const DEFAULT_LIMIT = 50
/** A trace that grows beyond this is a client reusing one trace id for everything. */
const MAX_SPANS_PER_TRACE = 512
/** Written down in one go: a loop costs a third of as many times a little between other things, as code and data are near by then. */
const RECORDS_AT_ONCE = 32
/** Of a trace on the heap: its place in the map, its id. Measured on Node 20. */
const TRACE_BYTES = 250
/** Text of a span that is too long to be kept whole. */
const CUT = 256

/**
 * The last traces, in memory: bounded by number and by bytes, the oldest leave first. Spans of one trace come from
 * several processes in any order and are joined by trace id; one that comes twice is kept once. They are kept outside of
 * the heap and become objects when somebody looks at their trace, which of most traces nobody ever does.
 */
export class TraceStore {
  readonly #traces = new Map<string, Trace>()
  /** From the oldest on. Kept from one eviction to the next: each new one would step over all that have left before. */
  #ages = this.#traces.keys()
  #oldest: string | undefined
  readonly #maxTraces: number
  readonly #maxBytes: number
  readonly #watchers = new Set<(span: StoredSpan) => void>()
  #log: EntryLog
  /** Records that are over and not yet written down: the last few. */
  #over: TraceRecord[] = []
  #lastOrigin: { readonly origin: SpanOrigin, readonly text: string } | undefined

  /** @throws RangeError when maxBytes is out of its bounds */
  constructor ({ maxTraces = DEFAULT_MAX_TRACES, maxBytes = DEFAULT_MAX_BYTES }: TraceStoreOptions = {}) {
    if (!(maxBytes >= MIN_BYTES && maxBytes <= MAX_BYTES)) throw new RangeError(`maxBytes must be ${MIN_BYTES} to ${MAX_BYTES}`)
    this.#maxTraces = maxTraces
    this.#maxBytes = maxBytes
    this.#log = new EntryLog(maxBytes)
  }

  get size (): number { return this.#traces.size }
  /** Of memory, estimated where it is on the heap. */
  get bytes (): number { return this.#log.bytes + this.#traces.size * TRACE_BYTES }

  /** False when it was there already, or its trace has too many. */
  add (span: StoredSpan): boolean {
    const trace = this.#traces.get(span.traceId) ?? this.#begin(flat(span.traceId))
    const mark = markOf(span.spanId)
    if (trace.count >= MAX_SPANS_PER_TRACE || this.#has(trace, mark, span.spanId)) return false
    this.#append(trace, mark, span)
    this.#evict()
    for (const tell of this.#watchers) tell(span)
    return true
  }

  /** A span of this record has ended. With its first span the record is over, and will be written down. */
  record (record: TraceRecord, row: number): void {
    // Nearly all that end in between: there is nothing to do.
    if (!record.shown || record.over) this.#show(record, row)
    if (this.#watchers.size === 0) return
    const span = record.span(row)
    for (const tell of this.#watchers) tell(span)
  }

  #show (record: TraceRecord, row: number): void {
    record.shown = true
    const trace = this.#traces.get(record.traceId) ?? this.#begin(record.traceId)
    const held = trace.open !== undefined && trace.open.includes(record)
    if (row !== 0 && record.over) {
      if (!held) this.#append(trace, markOf(record.spanId(row)), record.span(row))
    } else if (!held) (trace.open ??= []).push(record)
    if (row === 0 && this.#over.push(record) >= RECORDS_AT_ONCE) this.#writeDown()
    this.#evict()
  }

  /** Newest first. */
  list (filter: TraceFilter = {}): TraceSummary[] {
    const limit = filter.limit ?? DEFAULT_LIMIT
    const found: TraceSummary[] = []
    // Keys alone are cheap to turn around; most lists end after a few of them.
    const ids = [...this.#traces.keys()]
    for (let i = ids.length - 1; i >= 0 && found.length < limit; i--) {
      const trace = this.#traces.get(ids[i]!)!
      const summary = summarise(ids[i]!, { [Symbol.iterator]: () => this.#spansOf(trace) }, countOf(trace))
      if (matches(summary, filter)) found.push(summary)
    }
    return found
  }

  get (traceId: string): TraceView | undefined {
    const trace = this.#traces.get(traceId)
    return trace === undefined ? undefined : viewTrace(traceId, [...this.#spansOf(trace)])
  }

  /** Spans of the last so many traces. */
  * lastSpans (traces: number): Iterable<StoredSpan> {
    let skip = this.#traces.size - traces
    for (const trace of this.#traces.values()) if (skip-- <= 0) yield * this.#spansOf(trace)
  }

  /** Told of each span that is added. Call what it returns to end that. */
  watch (listener: (span: StoredSpan) => void): () => void {
    this.#watchers.add(listener)
    return () => { this.#watchers.delete(listener) }
  }

  clear (): void {
    this.#traces.clear()
    this.#ages = this.#traces.keys()
    this.#oldest = undefined
    this.#over = []
    this.#log = new EntryLog(this.#maxBytes)
  }

  #begin (traceId: string): Trace {
    const trace: Trace = { first: this.#log.end, last: NOWHERE, count: 0, open: undefined }
    this.#traces.set(traceId, trace)
    return trace
  }

  #writeDown (): void {
    for (const record of this.#over) {
      const trace = this.#traces.get(record.traceId)
      if (trace?.open?.includes(record) !== true) continue
      trace.open = trace.open.length === 1 ? undefined : trace.open.filter(one => one !== record)
      if (trace.count < MAX_SPANS_PER_TRACE) this.#write(trace, record)
    }
    this.#over = []
  }

  #write (trace: Trace, record: TraceRecord): void {
    const words = record.pack()
    if (words === undefined || words.byteLength > this.#log.longest) {
      for (const span of record.spans()) this.#append(trace, markOf(span.spanId), span)
      return
    }
    trace.last = this.#log.appendWords(trace.last, RECORD, 0, words)
    trace.count += record.ended
  }

  #append (trace: Trace, mark: number, span: StoredSpan): void {
    const longest = this.#log.longest / 3
    if (span instanceof SentSpan) {
      const origin = this.#originText(span.origin)
      if (origin.length + span.text.length <= longest) return this.#writeText(trace, SENT, mark, origin, span.text)
    }
    let text = JSON.stringify(plain(span))
    if (text.length > longest) text = JSON.stringify(plain(span), cut)
    if (text.length > longest) text = JSON.stringify({ ...plain(span), attributes: {} }, cut)
    this.#writeText(trace, SPAN, mark, text)
  }

  #writeText (trace: Trace, kind: number, mark: number, text: string, more?: string): void {
    trace.last = this.#log.appendText(trace.last, kind, mark, text, more)
    trace.count++
  }

  /** All spans of a call have the same. */
  #originText (origin: SpanOrigin): string {
    if (this.#lastOrigin?.origin !== origin) this.#lastOrigin = { origin, text: `${JSON.stringify(origin)}\n` }
    return this.#lastOrigin.text
  }

  #has ({ last }: Trace, mark: number, spanId: string): boolean {
    for (let at = last; at !== NOWHERE; at = this.#log.before(at)) {
      if (this.#log.mark(at) === mark && this.#read(at)[Symbol.iterator]().next().value?.spanId === spanId) return true
    }
    return false
  }

  /** Records first: the request's own span is in one, and most who look need no other. */
  * #spansOf ({ last, open = [] }: Trace): Generator<StoredSpan, undefined> {
    for (const record of open) yield * record.spans()
    for (const records of [true, false]) {
      for (let at = last; at !== NOWHERE; at = this.#log.before(at)) if ((this.#log.kind(at) === RECORD) === records) yield * this.#read(at)
    }
  }

  #read (at: number): Iterable<StoredSpan> {
    switch (this.#log.kind(at)) {
      case RECORD: return unpackRecord(this.#log.words(at))
      case SENT: return [sentAgain(this.#log.text(at))]
      default: return [JSON.parse(this.#log.text(at)) as StoredSpan]
    }
  }

  #evict (): void {
    while (this.#traces.size > this.#maxTraces || this.bytes > this.#maxBytes) {
      const oldest = this.#oldest ?? this.#nextOldest()
      if (oldest === undefined) return
      this.#traces.delete(oldest)
      this.#oldest = this.#nextOldest()
      this.#log.forget(this.#oldest === undefined ? this.#log.end : this.#traces.get(this.#oldest)!.first)
    }
  }

  #nextOldest (): string | undefined {
    const { value, done } = this.#ages.next()
    if (done !== true || this.#traces.size === 0) return value
    // It had come to the end, and is of no use after that.
    this.#ages = this.#traces.keys()
    return this.#ages.next().value
  }
}

function sentAgain (text: string): SentSpan {
  const end = text.indexOf('\n')
  return SentSpan.again(text.slice(end + 1), JSON.parse(text.slice(0, end)) as SpanOrigin)
}

/** A copy of an id that is part of another text, which would stay as long as the part. */
function flat (id: string): string {
  return Buffer.from(id, 'latin1').toString('latin1')
}

/** The end of a span's id, which is random, as a number. */
function markOf (spanId: string): number {
  return Number.parseInt(spanId.slice(-8), 16) | 0
}

function countOf ({ count, open = [] }: Trace): number {
  return open.reduce((sum, { ended }) => sum + ended, count)
}

function cut (_key: string, value: unknown): unknown {
  return typeof value === 'string' ? value.slice(0, CUT) : value
}

/** Spans may be objects with getters, which JSON passes over. */
function plain ({ traceId, spanId, parentSpanId, name, kind, startTime, endTime, attributes, status, message, service, instance }: StoredSpan): StoredSpan {
  return { traceId, spanId, parentSpanId, name, kind, startTime, endTime, attributes, status, message, service, instance }
}
