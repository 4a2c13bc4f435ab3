import { SpanKind, SpanStatusCode, type Attributes } from '@opentelemetry/api'
import { fromWords, toWords } from './compact.ts'
import { randomIdPrefix, randomTraceId, spanIdOf } from '../telemetry/ids.ts'
import { SPAN_KINDS, type AttributeValue, type SpanOrigin, type StoredSpan } from './stored-span.ts'

/** A span as a row: name, kind, its parent's row, start and end in microseconds after the record's first, status and its message. */
const [NAME, KIND, PARENT, START, END, STATUS, MESSAGE, ROW] = [0, 1, 2, 3, 4, 5, 6, 7] as const
const NONE = -1

/** What there is to write down of a record. */
interface RecordData {
  readonly traceId: string
  /** Of the span ids: rows are counted behind it. */
  readonly prefix: string
  /** Id of a span of another process, above all that have no parent here. */
  readonly above: string | undefined
  readonly origin: SpanOrigin
  /** Milliseconds of Unix time. */
  readonly zero: number
  readonly rows: Array<string | number | null>
  /** The row of a span, then keys and values, up to the next number in the place of a key. */
  readonly attributes: Array<string | number | AttributeValue>
}

/**
 * What this process has to say of one request: its spans, in two flat lists. Few objects, whose writing costs little,
 * that are packed into one run of words when the request is over.
 */
export class TraceRecord {
  /** Spans that have ended. */
  ended = 0
  /** A store shows it, as long as its trace is there. */
  shown = false
  readonly #data: RecordData

  /** @param start of its first span, in milliseconds of Unix time */
  constructor (origin: SpanOrigin, start: number, above?: { readonly traceId: string, readonly spanId: string }) {
    this.#data = { traceId: above?.traceId ?? randomTraceId(), prefix: randomIdPrefix(), above: above?.spanId, origin, zero: start, rows: [], attributes: [] }
  }

  get traceId (): string { return this.#data.traceId }
  /** Has the first span, that of the request, ended? */
  get over (): boolean { return !this.running(0) }

  /** @returns the row it has from now on */
  begin (name: string, kind: SpanKind, start: number, parent = NONE): number {
    const { rows } = this.#data
    rows.push(name, kind, parent, this.#micros(start), NONE, SpanStatusCode.UNSET, null)
    return rows.length - ROW
  }

  running (row: number): boolean { return this.#data.rows[row + END] === NONE }
  rename (row: number, name: string): void { this.#data.rows[row + NAME] = name }

  set (row: number, set: Attributes): void {
    const { attributes } = this.#data
    attributes.push(row)
    for (const key in set) {
      const value = set[key]
      if (value !== undefined && value !== null) attributes.push(key, value)
    }
  }

  setStatus (row: number, status: SpanStatusCode, message = ''): void {
    this.#data.rows[row + STATUS] = status
    this.#data.rows[row + MESSAGE] = message
  }

  end (row: number, end: number): void {
    const { rows } = this.#data
    this.ended++
    rows[row + END] = Math.max(this.#micros(end), rows[row + START] as number)
  }

  spanId (row: number): string { return spanIdOf(this.#data.prefix, row / ROW) }
  span (row: number): StoredSpan { return new RowSpan(this.#data, row) }
  /** Those that have ended, the first first. */
  spans (): Iterable<StoredSpan> { return spansOf(this.#data) }

  /** @returns undefined when it is too long for that */
  pack (): Int32Array | undefined {
    const { traceId, prefix, above, origin: { service, instance }, zero, rows, attributes } = this.#data
    return toWords([traceId, prefix, above, service, instance, zero, rows, attributes])
  }

  #micros (time: number): number {
    return Math.floor((time - this.#data.zero) * 1e3)
  }
}

type Packed = [traceId: string, prefix: string, above: string | null, service: string, instance: string | null, zero: number, rows: RecordData['rows'], attributes: RecordData['attributes']]

/** The spans of a record that was packed. */
export function unpackRecord (words: Int32Array): Iterable<StoredSpan> {
  const [traceId, prefix, above, service, instance, zero, rows, attributes] = fromWords(words) as Packed
  return spansOf({ traceId, prefix, above: above ?? undefined, origin: { service, instance: instance ?? undefined }, zero, rows, attributes })
}

function * spansOf (data: RecordData): Iterable<StoredSpan> {
  for (let row = 0; row < data.rows.length; row += ROW) if (data.rows[row + END] !== NONE) yield new RowSpan(data, row)
}

class RowSpan implements StoredSpan {
  readonly name: string
  readonly kind: StoredSpan['kind']
  readonly status: StoredSpan['status']
  readonly message: string | undefined
  readonly #data: RecordData
  readonly #row: number
  #attributes: StoredSpan['attributes'] | undefined

  constructor (data: RecordData, row: number) {
    const { rows } = data
    this.name = rows[row + NAME] as string
    this.kind = SPAN_KINDS[rows[row + KIND] as SpanKind]
    this.status = rows[row + STATUS] === SpanStatusCode.ERROR ? 'error' : rows[row + STATUS] === SpanStatusCode.OK ? 'ok' : 'unset'
    this.message = this.status === 'error' ? rows[row + MESSAGE] as string : undefined
    this.#data = data
    this.#row = row
  }

  get traceId (): string { return this.#data.traceId }
  get service (): string { return this.#data.origin.service }
  get instance (): string | undefined { return this.#data.origin.instance }
  get spanId (): string { return spanIdOf(this.#data.prefix, this.#row / ROW) }
  get startTime (): StoredSpan['startTime'] { return this.#time(START) }
  get endTime (): StoredSpan['endTime'] { return this.#time(END) }

  get parentSpanId (): string | undefined {
    const { prefix, above, rows } = this.#data
    const parent = rows[this.#row + PARENT] as number
    return parent === NONE ? above : spanIdOf(prefix, parent / ROW)
  }

  /** Put together when somebody looks, as most who look want times and names. */
  get attributes (): StoredSpan['attributes'] {
    this.#attributes ??= attributesOf(this.#data, this.#row)
    return this.#attributes
  }

  #time (column: typeof START | typeof END): [number, number] {
    const ms = this.#data.zero + (this.#data.rows[this.#row + column] as number) / 1e3
    const seconds = Math.floor(ms / 1e3)
    return [seconds, Math.floor((ms - seconds * 1e3) * 1e6)]
  }
}

function attributesOf ({ attributes }: RecordData, row: number): StoredSpan['attributes'] {
  const found: Record<string, AttributeValue> = {}
  let mine = false
  for (let i = 0; i < attributes.length; i++) {
    const key = attributes[i]!
    if (typeof key === 'number') mine = key === row
    else if (mine) found[key as string] = attributes[++i]!
    else i++
  }
  return found
}
