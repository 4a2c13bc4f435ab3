import type { AttributeValue, SpanKindName, SpanOrigin, StoredSpan } from './span.ts'

/** The spans of an ExportTraceServiceRequest. `rejected` ones had a bad id, name or time, or were beyond the bound. */
export interface ParsedSpans {
  readonly spans: StoredSpan[]
  readonly rejected: number
}

const MAX_SPANS = 2_048
const MAX_ATTRIBUTES = 64
const MAX_KEY = 256
const TRACE_ID = /^(?!0{32})[0-9a-f]{32}$/
const SPAN_ID = /^(?!0{16})[0-9a-f]{16}$/
const NANOS = /^\d{10,20}$/
const KINDS: readonly SpanKindName[] = ['internal', 'internal', 'server', 'client', 'producer', 'consumer']

type Json = Readonly<Record<string, unknown>>

/**
 * Reads the body of an OTLP trace export, in the shape of its JSON, which is untrusted: it takes at most 2,048 spans with 64 attributes
 * each and drops nested values. The store bounds texts and lists.
 *
 * @param instance the sender's engine id, whatever the resource claims; undefined: what it claims
 * @returns undefined when the body is no export request
 */
export function parseOtlpTraces (body: unknown, instance: string | undefined): ParsedSpans | undefined {
  if (!isObject(body) || !Array.isArray(body.resourceSpans)) return undefined
  const spans: StoredSpan[] = []
  let rejected = 0
  for (const { resource, scopeSpans } of objects(body.resourceSpans)) {
    const { 'service.name': name, 'service.instance.id': claimed } = attributesOf(isObject(resource) ? resource.attributes : undefined)
    const origin = { service: typeof name === 'string' ? name : 'unknown_service', instance: instance ?? (typeof claimed === 'string' ? claimed : undefined) }
    for (const scope of objects(scopeSpans)) {
      for (const raw of Array.isArray(scope.spans) ? scope.spans as unknown[] : []) {
        const span = spans.length < MAX_SPANS && isObject(raw) ? spanOf(raw, origin) : undefined
        if (span === undefined) rejected++
        else spans.push(span)
      }
    }
  }
  return { spans, rejected }
}

function spanOf (raw: Json, { service, instance }: SpanOrigin): StoredSpan | undefined {
  const { traceId, spanId, parentSpanId, name } = raw
  const { code, message } = isObject(raw.status) ? raw.status : {}
  const startTime = timeOf(raw.startTimeUnixNano)
  const endTime = timeOf(raw.endTimeUnixNano)
  if (typeof traceId !== 'string' || !TRACE_ID.test(traceId) || typeof spanId !== 'string' || !SPAN_ID.test(spanId)) return undefined
  if (typeof name !== 'string' || name === '' || startTime === undefined || endTime === undefined) return undefined
  return {
    traceId,
    spanId,
    parentSpanId: typeof parentSpanId === 'string' && SPAN_ID.test(parentSpanId) ? parentSpanId : undefined,
    name,
    kind: KINDS[Number(raw.kind)] ?? 'internal',
    startTime,
    endTime,
    attributes: attributesOf(raw.attributes),
    status: code === 2 ? 'error' : code === 1 ? 'ok' : 'unset',
    message: typeof message === 'string' && message !== '' ? message : undefined,
    service,
    instance
  }
}

/** A fixed64, in JSON a decimal string; some senders write a number. */
function timeOf (value: unknown): [number, number] | undefined {
  const digits = typeof value === 'number' ? String(value) : value
  if (typeof digits !== 'string' || !NANOS.test(digits)) return undefined
  return [Number(digits.slice(0, -9)), Number(digits.slice(-9))]
}

function attributesOf (list: unknown): Record<string, AttributeValue> {
  const attributes: Record<string, AttributeValue> = {}
  for (const { key, value } of objects(list).slice(0, MAX_ATTRIBUTES)) {
    if (typeof key !== 'string' || key.length > MAX_KEY || key === '__proto__' || !isObject(value)) continue
    const read = isObject(value.arrayValue) ? objects(value.arrayValue.values).flatMap(one => scalarOf(one) ?? []) : scalarOf(value)
    if (read !== undefined) attributes[key] = read
  }
  return attributes
}

function scalarOf (value: Json): string | number | boolean | undefined {
  if (typeof value.stringValue === 'string') return value.stringValue
  if (typeof value.boolValue === 'boolean') return value.boolValue
  const number = value.intValue ?? value.doubleValue
  if (number === undefined || number === null || number === '') return undefined
  return Number.isFinite(Number(number)) ? Number(number) : undefined
}

function objects (list: unknown): Json[] {
  return Array.isArray(list) ? list.filter(isObject) : []
}

function isObject (value: unknown): value is Json {
  return typeof value === 'object' && value !== null && !Array.isArray(value)
}
