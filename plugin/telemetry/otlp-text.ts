import { attributesOf, originOf, parseOtlpTraces, statusOf, type ParsedSpans, type SpanOrigin } from './otlp-json.ts'
import { SPAN } from './semconv.ts'
import type { StoredSpan } from './trace-store.ts'

const SPANS = '"spans":['
const SPAN_START = '{"traceId":"'
const TAIL = ']}]}]}'
/** A span as engines/server/span-json.ts writes it, up to its attributes. */
const HEAD = /^\{"traceId":"(?!0{32})[0-9a-f]{32}","spanId":"(?!0{16})[0-9a-f]{16}",(?:"parentSpanId":"(?!0{16})[0-9a-f]{16}",)?"name":"([a-z.]+)","kind":1,"startTimeUnixNano":"\d{19}","endTimeUnixNano":"\d{19}","attributes":(?=\[)/
const PARENT = '"parentSpanId":"'
const TRACE_ID_AT = SPAN_START.length
const SPAN_ID_AT = TRACE_ID_AT + 32 + '","spanId":"'.length
const PARENT_AT = SPAN_ID_AT + 16 + '",'.length
const END_BEFORE_REST = 19 + '","attributes":'.length
const START_BEFORE_REST = END_BEFORE_REST + 19 + '","endTimeUnixNano":"'.length
const MAX_SPANS = 2_048
const MAX_BYTES = 8 * 1024
/** One copy of each name, however many spans bear it. */
const NAMES: ReadonlyMap<string, string> = new Map(Object.values(SPAN).map(name => [name, name]))

/**
 * The spans of an OTLP/HTTP JSON trace export, whoever wrote it.
 *
 * @param instance whose spans these are, whatever their resource claims
 * @returns undefined when the body is not an export request at all
 * @throws SyntaxError when it is not JSON
 */
export function readSpans (body: Buffer, instance: string): ParsedSpans | undefined {
  const spans = cutSpans(body, instance)
  return spans === undefined ? parseOtlpTraces(JSON.parse(body.toString()), instance) : { spans, rejected: 0 }
}

/**
 * The short way in for the spans of our own engines. Only what joins them to their traces is read: ids and name. All
 * else stays text until somebody looks at the trace, which of most traces nobody ever does. The marks it cuts at hold
 * bare quotes, which no JSON string can, so that they are what they seem to be.
 *
 * @returns undefined for a body of any other form: parseOtlpTraces reads it
 */
export function cutSpans (body: Buffer, instance: string): StoredSpan[] | undefined {
  const text = body.toString('latin1')
  const first = text.indexOf(SPANS) + SPANS.length
  if (first < SPANS.length || !text.endsWith(TAIL)) return undefined
  const origin = envelopeOf(text.slice(0, first), instance)
  if (origin === undefined) return undefined
  const spans: StoredSpan[] = []
  const last = text.length - TAIL.length
  for (let at = first, next: number; at < last; at = next) {
    next = text.indexOf(SPAN_START, at + 1)
    // What follows anything but a span is a link, or the first span of another scope.
    if (next !== -1 && !text.startsWith('},', next - 2)) return undefined
    const span = spans.length < MAX_SPANS ? spanAt(body, at, next === -1 ? last : next - 1, origin) : undefined
    if (span === undefined) return undefined
    spans.push(span)
    if (next === -1) break
  }
  return spans
}

function envelopeOf (text: string, instance: string): SpanOrigin | undefined {
  try {
    const { resourceSpans: [{ resource }] } = JSON.parse(text + TAIL)
    return originOf(resource, instance)
  } catch {
    return undefined
  }
}

function spanAt (body: Buffer, from: number, to: number, { service, instance }: SpanOrigin): StoredSpan | undefined {
  if (to - from > MAX_BYTES) return undefined
  // A copy, made from the bytes: a slice of the body's text would keep all of it.
  const text = body.toString('utf8', from, to)
  const head = HEAD.exec(text)
  const name = head === null ? undefined : NAMES.get(head[1]!)
  return head === null || name === undefined ? undefined : new SentSpan(text, head[0].length, name, service, instance)
}

/** What such an object takes, measured on Node 20, beside its text. */
const SENT_BYTES = 250

class SentSpan implements StoredSpan {
  readonly traceId: string
  readonly spanId: string
  readonly name: string
  readonly kind = 'internal'
  readonly service: string
  readonly instance: string | undefined
  readonly #text: string
  /** Where its attributes begin. */
  readonly #rest: number

  constructor (text: string, rest: number, name: string, service: string, instance: string | undefined) {
    this.traceId = text.slice(TRACE_ID_AT, TRACE_ID_AT + 32)
    this.spanId = text.slice(SPAN_ID_AT, SPAN_ID_AT + 16)
    this.name = name
    this.service = service
    this.instance = instance
    this.#text = text
    this.#rest = rest
  }

  get bytes (): number { return SENT_BYTES + this.#text.length }
  get parentSpanId (): string | undefined { return this.#text.startsWith(PARENT, PARENT_AT) ? this.#text.slice(PARENT_AT + PARENT.length, PARENT_AT + PARENT.length + 16) : undefined }
  get start (): readonly [number, number] { return this.#time(START_BEFORE_REST) }
  get end (): readonly [number, number] { return this.#time(END_BEFORE_REST) }
  get attributes (): StoredSpan['attributes'] { return attributesOf(this.#read().attributes) }
  get status (): StoredSpan['status'] { return this.#plain ? 'unset' : statusOf(this.#read().status).status }
  get message (): string | undefined { return this.#plain ? undefined : statusOf(this.#read().status).message }

  /** Most spans end with their attributes. */
  get #plain (): boolean { return this.#text.endsWith(']}') }

  #time (before: number): [number, number] {
    const at = this.#rest - before
    return [Number(this.#text.slice(at, at + 10)), Number(this.#text.slice(at + 10, at + 19))]
  }

  #read (): { attributes?: unknown, status?: unknown } {
    try {
      return JSON.parse(`{"attributes":${this.#text.slice(this.#rest)}`)
    } catch {
      return {}
    }
  }
}
