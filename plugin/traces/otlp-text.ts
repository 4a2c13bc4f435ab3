import { isAscii } from 'node:buffer'
import { attributesOf, originOf, parseOtlpTraces, statusOf, type ParsedSpans } from './otlp-json.ts'
import { SPAN } from '../../adapters/wire/semconv.ts'
import type { SpanOrigin, StoredSpan } from './stored-span.ts'

const SPANS = '"spans":['
const SPAN_START = '{"traceId":"'
const TAIL = ']}]}]}'
/** A span as engines/server/span-json.ts writes it, up to its attributes. */
const HEAD = /\{"traceId":"(?!0{32})[0-9a-f]{32}","spanId":"(?!0{16})[0-9a-f]{16}",(?:"parentSpanId":"(?!0{16})[0-9a-f]{16}",)?"name":"[a-z.]+","kind":1,"startTimeUnixNano":"\d{19}","endTimeUnixNano":"\d{19}","attributes":(?=\[)/y
const PARENT = '"parentSpanId":"'
const NAME = '"name":"'
const TRACE_ID_AT = SPAN_START.length
const SPAN_ID_AT = TRACE_ID_AT + 32 + '","spanId":"'.length
const PARENT_AT = SPAN_ID_AT + 16 + '",'.length
const PARENT_LENGTH = PARENT.length + 16 + '",'.length
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
export function cutSpans (body: Buffer, instance: string): SentSpan[] | undefined {
  // Where all is ASCII, places in the text are places in the body too, and the other way round.
  const ascii = isAscii(body)
  const text = body.toString('latin1')
  const first = text.indexOf(SPANS) + SPANS.length
  if (first < SPANS.length || !text.endsWith(TAIL)) return undefined
  const origin = envelopeOf(text.slice(0, first), instance)
  if (origin === undefined) return undefined
  const spans: SentSpan[] = []
  const last = text.length - TAIL.length
  for (let at = first, next: number; at < last; at = next) {
    next = text.indexOf(SPAN_START, at + 1)
    // What follows anything but a span is a link, or the first span of another scope.
    if (next !== -1 && !text.startsWith('},', next - 2)) return undefined
    const end = next === -1 ? last : next - 1
    if (spans.length >= MAX_SPANS || end - at > MAX_BYTES) return undefined
    const span = ascii ? spanAt(text, at, end, origin) : spanOf(body.toString('utf8', at, end), origin)
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

function spanOf (text: string, origin: SpanOrigin): SentSpan | undefined {
  return spanAt(text, 0, text.length, origin)
}

function spanAt (text: string, from: number, to: number, origin: SpanOrigin): SentSpan | undefined {
  HEAD.lastIndex = from
  if (!HEAD.test(text)) return undefined
  const rest = HEAD.lastIndex - from
  const nameAt = from + PARENT_AT + (text.startsWith(PARENT, from + PARENT_AT) ? PARENT_LENGTH : 0) + NAME.length
  const name = NAMES.get(text.slice(nameAt, text.indexOf('"', nameAt)))
  return name === undefined ? undefined : new SentSpan(text.slice(from, to), rest, name, origin)
}

/** A span that is the text of one. */
export class SentSpan implements StoredSpan {
  readonly name: string
  readonly kind = 'internal'
  readonly text: string
  readonly origin: SpanOrigin
  /** Where its attributes begin. */
  readonly #rest: number

  constructor (text: string, rest: number, name: string, origin: SpanOrigin) {
    this.name = name
    this.text = text
    this.origin = origin
    this.#rest = rest
  }

  /** From `text` and `origin` of one that was. */
  static again (text: string, origin: SpanOrigin): SentSpan {
    return spanOf(text, origin)!
  }

  get service (): string { return this.origin.service }
  get instance (): string | undefined { return this.origin.instance }
  get traceId (): string { return this.text.slice(TRACE_ID_AT, TRACE_ID_AT + 32) }
  get spanId (): string { return this.text.slice(SPAN_ID_AT, SPAN_ID_AT + 16) }
  get parentSpanId (): string | undefined { return this.text.startsWith(PARENT, PARENT_AT) ? this.text.slice(PARENT_AT + PARENT.length, PARENT_AT + PARENT.length + 16) : undefined }
  get startTime (): readonly [number, number] { return this.#time(START_BEFORE_REST) }
  get endTime (): readonly [number, number] { return this.#time(END_BEFORE_REST) }
  get attributes (): StoredSpan['attributes'] { return attributesOf(this.#read().attributes) }
  get status (): StoredSpan['status'] { return this.#plain ? 'unset' : statusOf(this.#read().status).status }
  get message (): string | undefined { return this.#plain ? undefined : statusOf(this.#read().status).message }

  /** Most spans end with their attributes. */
  get #plain (): boolean { return this.text.endsWith(']}') }

  #time (before: number): [number, number] {
    const at = this.#rest - before
    return [Number(this.text.slice(at, at + 10)), Number(this.text.slice(at + 10, at + 19))]
  }

  #read (): { attributes?: unknown, status?: unknown } {
    try {
      return JSON.parse(`{"attributes":${this.text.slice(this.#rest)}`)
    } catch {
      return {}
    }
  }
}
