import { subscribe, unsubscribe } from 'node:diagnostics_channel'
import { context, createContextKey, defaultTextMapGetter, defaultTextMapSetter, propagation, ROOT_CONTEXT, trace, type Context } from '@opentelemetry/api'
import { W3CTraceContextPropagator } from '@opentelemetry/core'

/** Marks contexts made here, so that only this gateway's own upstream calls are looked at. */
const kOurs = createContextKey('fastify-epd.upstream')
const CHANNEL = 'undici:request:create'
const TRACE_FIELDS = ['traceparent', 'tracestate'] as const
/** Engines read the W3C's headers, whatever propagators the application has, or none. */
const W3C = new W3CTraceContextPropagator()

export type IncomingHeaders = Readonly<Record<string, string | string[] | undefined>>

/** The caller's context: an active span's (another instrumentation made it), else what the request's headers carry. */
export function parentContext (headers: IncomingHeaders): Context {
  const active = context.active()
  if (trace.getSpan(active) !== undefined) return active
  const extracted = propagation.extract(active, headers)
  return trace.getSpan(extracted) === undefined ? W3C.extract(active, headers, defaultTextMapGetter) : extracted
}

/** `from` marked as belonging to an upstream call of ours; so are all contexts made from it. */
export function upstreamContext (from: Context): Context {
  return from.setValue(kOurs, true)
}

/**
 * Trace headers for an upstream call within `from`. Without a span of ours to name, the client's own headers pass
 * through unchanged, as a transparent intermediary's should.
 */
export function propagationHeaders (from: Context, incoming: IncomingHeaders): Record<string, string> {
  const headers: Record<string, string> = {}
  propagation.inject(from, headers)
  if (headers.traceparent === undefined && trace.getSpanContext(from)?.isRemote !== true) W3C.inject(from, headers, defaultTextMapSetter)
  if (headers.traceparent === undefined) forward(incoming, headers)
  return headers
}

/** Trace id of the client's `traceparent`, when it has a well-formed one. */
export function callersTraceId (headers: IncomingHeaders): string | undefined {
  return trace.getSpanContext(W3C.extract(ROOT_CONTEXT, headers, defaultTextMapGetter))?.traceId
}

function forward (incoming: IncomingHeaders, headers: Record<string, string>): void {
  const { traceparent, tracestate } = incoming
  // What is malformed would only be thrown away further on.
  if (typeof traceparent !== 'string' || callersTraceId(incoming) === undefined) return
  headers.traceparent = traceparent
  if (typeof tracestate === 'string') headers.tracestate = tracestate
}

let users = 0

/**
 * Keeps exactly one `traceparent` on each upstream call, whether or not undici is instrumented too: the
 * instrumentation adds its own to the one the call already has, and a receiver reads the two as one invalid value.
 * The instrumentation's is a child of ours, so ours goes. Call it after the SDK is up (subscribers run in order).
 *
 * @returns ends that, when the gateway closes
 */
export function keepOneTraceparent (): () => void {
  if (users++ === 0) subscribe(CHANNEL, dropOurs)
  let done = false
  return () => {
    if (done) return
    done = true
    if (--users === 0) unsubscribe(CHANNEL, dropOurs)
  }
}

function dropOurs (message: unknown): void {
  if (context.active().getValue(kOurs) !== true) return
  const headers = (message as { request?: { headers?: unknown } }).request?.headers
  if (!Array.isArray(headers)) return
  for (const field of TRACE_FIELDS) dropFirstOfTwo(headers, field)
}

/** `headers` is undici's flat list: name, value, name, value. */
function dropFirstOfTwo (headers: unknown[], field: string): void {
  let first = -1
  for (let i = 0; i < headers.length; i += 2) {
    if (typeof headers[i] !== 'string' || (headers[i] as string).toLowerCase() !== field) continue
    if (first === -1) { first = i; continue }
    headers.splice(first, 2)
    return
  }
}
