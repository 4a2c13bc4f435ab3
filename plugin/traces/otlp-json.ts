import type { AttributeValue, SpanKindName, SpanOrigin, StoredSpan } from './stored-span.ts'

/** What an ExportTraceServiceRequest held. `rejected` spans had a bad id, name or time, or were beyond the bound. */
export interface ParsedSpans {
  readonly spans: StoredSpan[]
  readonly rejected: number
}

const MAX_SPANS = 2_048
const MAX_ATTRIBUTES = 64
const MAX_ARRAY = 64
const MAX_TEXT = 1_024
const MAX_NAME = 256
const TRACE_ID = /^(?!0{32})[0-9a-f]{32}$/
const SPAN_ID = /^(?!0{16})[0-9a-f]{16}$/
const NANOS = /^\d{10,20}$/
const KINDS: readonly SpanKindName[] = ['internal', 'internal', 'server', 'client', 'producer', 'consumer']

type Json = Readonly<Record<string, unknown>>

/**
 * Reads the body of an OTLP/HTTP JSON trace export. Strictly bounded, as it comes over the network: at most 2,048
 * spans, 64 attributes each, text cut at 1,024 characters; nested values are dropped.
 *
 * @param instance whose spans these are, whatever their resource claims
 * @returns undefined when the body is not an export request at all
 */
export function parseOtlpTraces (body: unknown, instance?: string): ParsedSpans | undefined {
  if (!isObject(body) || !Array.isArray(body.resourceSpans)) return undefined
  const spans: StoredSpan[] = []
  let rejected = 0
  for (const resourceSpans of objects(body.resourceSpans)) {
    const origin = originOf(resourceSpans.resource, instance)
    for (const scope of objects(resourceSpans.scopeSpans)) {
      for (const raw of Array.isArray(scope.spans) ? scope.spans as unknown[] : []) {
        const span = spans.length < MAX_SPANS && isObject(raw) ? spanOf(raw, origin) : undefined
        if (span === undefined) rejected++
        else spans.push(span)
      }
    }
  }
  return { spans, rejected }
}

/** Whose spans they are, as their resource says unless it is known better. */
export function originOf (resource: unknown, instance?: string): SpanOrigin {
  const attributes = attributesOf(isObject(resource) ? resource.attributes : undefined)
  return { service: textOf(attributes['service.name']) ?? 'unknown_service', instance: instance ?? textOf(attributes['service.instance.id']) }
}

export function statusOf (raw: unknown): Pick<StoredSpan, 'status' | 'message'> {
  const { code, message } = isObject(raw) ? raw : {}
  return {
    status: code === 2 ? 'error' : code === 1 ? 'ok' : 'unset',
    message: typeof message === 'string' && message !== '' ? message.slice(0, MAX_TEXT) : undefined
  }
}

function spanOf (raw: Json, origin: SpanOrigin): StoredSpan | undefined {
  const { traceId, spanId, parentSpanId, name } = raw
  const startTime = timeOf(raw.startTimeUnixNano)
  const endTime = timeOf(raw.endTimeUnixNano)
  if (typeof traceId !== 'string' || !TRACE_ID.test(traceId) || typeof spanId !== 'string' || !SPAN_ID.test(spanId)) return undefined
  if (typeof name !== 'string' || name === '' || startTime === undefined || endTime === undefined) return undefined
  return {
    traceId,
    spanId,
    parentSpanId: typeof parentSpanId === 'string' && SPAN_ID.test(parentSpanId) ? parentSpanId : undefined,
    name: name.slice(0, MAX_NAME),
    kind: KINDS[Number(raw.kind)] ?? 'internal',
    startTime,
    endTime,
    attributes: attributesOf(raw.attributes),
    ...statusOf(raw.status),
    service: origin.service,
    instance: origin.instance
  }
}

/** A fixed64, in JSON a decimal string; some senders write a number. */
function timeOf (value: unknown): [number, number] | undefined {
  const digits = typeof value === 'number' ? String(value) : value
  if (typeof digits !== 'string' || !NANOS.test(digits)) return undefined
  return [Number(digits.slice(0, -9)), Number(digits.slice(-9))]
}

export function attributesOf (list: unknown): Record<string, AttributeValue> {
  const attributes: Record<string, AttributeValue> = {}
  if (!Array.isArray(list)) return attributes
  for (let i = 0; i < list.length && i < MAX_ATTRIBUTES; i++) {
    const { key, value } = (list[i] ?? {}) as { key?: unknown, value?: unknown }
    if (typeof key !== 'string' || key === '__proto__' || !isObject(value)) continue
    const read = isObject(value.arrayValue) ? arrayOf(value.arrayValue.values) : scalarOf(value)
    if (read !== undefined) attributes[key.slice(0, MAX_NAME)] = read
  }
  return attributes
}

function arrayOf (values: unknown): Array<string | number | boolean> {
  return objects(values).slice(0, MAX_ARRAY).flatMap(value => scalarOf(value) ?? [])
}

function scalarOf (value: Json): string | number | boolean | undefined {
  if (typeof value.stringValue === 'string') return value.stringValue.slice(0, MAX_TEXT)
  if (typeof value.boolValue === 'boolean') return value.boolValue
  const number = value.intValue ?? value.doubleValue
  if (number === undefined || number === null || number === '') return undefined
  return Number.isFinite(Number(number)) ? Number(number) : undefined
}

function textOf (value: AttributeValue | undefined): string | undefined {
  return typeof value === 'string' ? value : undefined
}

function objects (list: unknown): Json[] {
  return Array.isArray(list) ? list.filter(isObject) : []
}

function isObject (value: unknown): value is Json {
  return typeof value === 'object' && value !== null && !Array.isArray(value)
}
