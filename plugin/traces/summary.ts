import { ATTR, SPAN, TRACER_NAME } from '../../adapters/wire/semconv.ts'
import type { AttributeValue, StoredSpan } from './span.ts'

/** The words of the metric `epd.requests`. `refused`: the client got a 4xx. */
export type TraceStatus = 'ok' | 'error' | 'refused' | 'aborted'
export type FailedStage = 'encode' | 'prefill' | 'decode'

/** A call to a node that has failed, whatever came of the request. */
export interface TraceFailure {
  /** The plan it belongs to, from 1. */
  readonly attempt: number
  readonly stage: FailedStage
  readonly node: string | undefined
  readonly code: string
  readonly message: string
}

export interface TraceSummary {
  readonly traceId: string
  /** Name of the request's own span; without one, of the topmost span. */
  readonly name: string
  readonly model: string | undefined
  /** Name of the client's key. */
  readonly key: string | undefined
  readonly plan: string | undefined
  readonly reason: string | undefined
  readonly status: TraceStatus
  /** HTTP status of the answer. */
  readonly statusCode: number | undefined
  /** Why the request has failed; `code` is the gateway's own (docs/errors.md). */
  readonly error: { readonly code: string, readonly message: string } | undefined
  /** Calls that have failed, also of a request that went well in the end; the first 16. */
  readonly failures: readonly TraceFailure[]
  /** Plans after the first. */
  readonly retries: number
  /** ISO 8601. */
  readonly start: string
  readonly durationMs: number
  readonly spans: number
  /** The request's own span is missing: the request is still running, or was not sampled here. */
  readonly partial: boolean
  readonly items: number
  /** Engine ids of the encoders, in item order. */
  readonly encoders: readonly string[]
  /** Engine ids of all nodes that were called. */
  readonly nodes: readonly string[]
  /** As the answer says; where it does not, as the engines' spans do. */
  readonly inputTokens: number | undefined
  readonly outputTokens: number | undefined
  /** Streams only: to the first event. */
  readonly firstTokenMs: number | undefined
  /** Streams only: mean time of a token after the first. */
  readonly perTokenMs: number | undefined
  /** Of the answer, over the whole request. */
  readonly tokensPerSecond: number | undefined
}

export interface TraceFilter {
  readonly model?: string | undefined
  readonly plan?: string | undefined
  readonly status?: TraceStatus | undefined
  readonly minDurationMs?: number | undefined
  /** Words, all of which must be found in the trace's id, name, model, key, plan, status, nodes or errors. */
  readonly search?: string | undefined
  /** @default 50 */
  readonly limit?: number | undefined
}

const MAX_FAILURES = 16
/** A map: a node may call a span `constructor`. */
const STAGES: ReadonlyMap<string, FailedStage> = new Map([[SPAN.encodeCall, 'encode'], [SPAN.prefill, 'prefill'], [SPAN.decode, 'decode']])
/** vLLM's names, from before the conventions had any. */
const [VLLM_INPUT, VLLM_OUTPUT] = ['gen_ai.usage.prompt_tokens', 'gen_ai.usage.completion_tokens'] as const

/** @param spans at least one, in any order */
export function summarise (traceId: string, spans: readonly StoredSpan[]): TraceSummary {
  // A span of another one's, of the client or a model server, may tell of an operation too.
  const request = spans.find(({ attributes }) => attributes[ATTR.operation] !== undefined && (attributes[ATTR.provider] ?? TRACER_NAME) === TRACER_NAME)
  const { name, status, attributes, message = '' } = request ?? topmost(spans)
  const { startTime, endTime } = request ?? extent(spans)
  const durationMs = millis(startTime, endTime)
  const outputTokens = number(attributes[ATTR.outputTokens]) ?? mostOf(spans, ATTR.outputTokens, VLLM_OUTPUT)
  const firstTokenMs = inMs(number(attributes[ATTR.timeToFirstChunk]))
  return {
    traceId,
    name,
    model: text(attributes[ATTR.requestModel]),
    key: text(attributes[ATTR.key]),
    plan: text(attributes[ATTR.topology]),
    reason: text(attributes[ATTR.reason]),
    status: outcomeOf({ status, attributes }),
    statusCode: number(attributes[ATTR.statusCode]),
    error: status === 'error' ? { code: codeOf(attributes), message } : undefined,
    failures: failuresOf(spans),
    retries: number(attributes[ATTR.retries]) ?? 0,
    start: iso(startTime),
    durationMs,
    spans: spans.length,
    partial: request === undefined,
    items: number(attributes[ATTR.items]) ?? 0,
    encoders: texts(attributes[ATTR.encoders]),
    nodes: nodesOf(spans),
    inputTokens: number(attributes[ATTR.inputTokens]) ?? mostOf(spans, ATTR.inputTokens, VLLM_INPUT),
    outputTokens,
    firstTokenMs,
    perTokenMs: perTokenMs(request === undefined ? undefined : firstTokenMs, durationMs, outputTokens),
    tokensPerSecond: request === undefined || !(durationMs > 0) || outputTokens === undefined ? undefined : round(outputTokens * 1_000 / durationMs)
  }
}

export function matches (summary: TraceSummary, filter: TraceFilter): boolean {
  return (filter.model === undefined || summary.model === filter.model) &&
    (filter.plan === undefined || summary.plan === filter.plan) &&
    (filter.status === undefined || summary.status === filter.status) &&
    (filter.minDurationMs === undefined || summary.durationMs >= filter.minDurationMs) &&
    (filter.search === undefined || isFound(summary, filter.search))
}

/** How a request ended, by its span. */
export function outcomeOf ({ status, attributes }: Pick<StoredSpan, 'status' | 'attributes'>): TraceStatus {
  if (status !== 'error') return attributes[ATTR.aborted] === true ? 'aborted' : 'ok'
  const statusCode = number(attributes[ATTR.statusCode]) ?? 0
  return statusCode >= 400 && statusCode < 500 ? 'refused' : 'error'
}

/** Mean time of a token after the first, of a stream that says how many it had. */
export function perTokenMs (firstTokenMs: number | undefined, durationMs: number, tokens: number | undefined): number | undefined {
  return firstTokenMs === undefined || tokens === undefined || tokens < 2 ? undefined : round(Math.max(0, durationMs - firstTokenMs) / (tokens - 1))
}

function isFound ({ traceId, name, model, key, plan, status, partial, encoders, nodes, error, failures }: TraceSummary, search: string): boolean {
  const errors = [...error === undefined ? [] : [error], ...failures].flatMap(({ code, message }) => [code, message])
  const texts = [traceId, name, model, key, plan, partial ? 'running' : status, ...encoders, ...nodes, ...errors].flatMap(one => one === undefined ? [] : [one.toLowerCase()])
  return search.toLowerCase().split(/\s+/).every(word => texts.some(one => one.includes(word)))
}

function failuresOf (spans: readonly StoredSpan[]): TraceFailure[] {
  const failed = spans.filter(({ name, status }) => status === 'error' && STAGES.has(name)).sort((a, b) => compare(a.endTime, b.endTime)).slice(0, MAX_FAILURES)
  if (failed.length === 0) return []
  const plans = spans.filter(({ name }) => name === SPAN.plan)
  return failed.map(({ name, startTime, attributes, message = '' }) => ({
    attempt: Math.max(1, plans.filter(plan => compare(plan.startTime, startTime) <= 0).length),
    stage: STAGES.get(name)!,
    node: text(attributes[ATTR.node]),
    code: codeOf(attributes),
    message
  }))
}

function nodesOf (spans: readonly StoredSpan[]): string[] {
  const nodes = new Set<string>()
  for (const { name, instance, attributes } of spans) {
    const node = STAGES.has(name) ? text(attributes[ATTR.node]) : instance
    if (node !== undefined) nodes.add(node)
  }
  return [...nodes]
}

/** The highest number that a span has under one of these names. */
function mostOf (spans: readonly StoredSpan[], ...names: readonly string[]): number | undefined {
  let most: number | undefined
  for (const { attributes } of spans) {
    for (const name of names) {
      const value = number(attributes[name])
      if (value !== undefined && (most === undefined || value > most)) most = value
    }
  }
  return most
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

export function compare (a: StoredSpan['startTime'], b: StoredSpan['startTime']): number {
  return a[0] - b[0] || a[1] - b[1]
}

/** To the microsecond. */
export function millis (from: StoredSpan['startTime'], to: StoredSpan['startTime']): number {
  return round((to[0] - from[0]) * 1e3 + (to[1] - from[1]) / 1e6)
}

export function iso ([seconds, nanoseconds]: StoredSpan['startTime']): string {
  return `${new Date(seconds * 1_000).toISOString().slice(0, 19)}.${String(Math.floor(nanoseconds / 1_000)).padStart(6, '0')}Z`
}

function round (value: number): number {
  return Math.round(value * 1e3) / 1e3
}

function inMs (seconds: number | undefined): number | undefined {
  return seconds === undefined ? undefined : round(seconds * 1e3)
}

function codeOf (attributes: StoredSpan['attributes']): string {
  return text(attributes[ATTR.errorType]) ?? 'error'
}

function text (value: AttributeValue | undefined): string | undefined {
  return typeof value === 'string' ? value : undefined
}

function texts (value: AttributeValue | undefined): string[] {
  return Array.isArray(value) ? value.filter((one): one is string => typeof one === 'string') : []
}

function number (value: AttributeValue | undefined): number | undefined {
  return typeof value === 'number' && Number.isFinite(value) ? value : undefined
}
