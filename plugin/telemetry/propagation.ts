import { context, defaultTextMapGetter, defaultTextMapSetter, propagation, ROOT_CONTEXT, trace, type Context } from '@opentelemetry/api'
import { suppressTracing, W3CTraceContextPropagator } from '@opentelemetry/core'
import type { Dispatcher } from 'undici'

/** Engines read the W3C's headers, whatever propagators the application has, or none. */
const W3C = new W3CTraceContextPropagator()
const UNTRACED = suppressTracing(ROOT_CONTEXT)

export type IncomingHeaders = Readonly<Record<string, string | string[] | undefined>>

/** The caller's context: an active span's (another instrumentation made it), else what the request's headers carry. */
export function parentContext (headers: IncomingHeaders): Context {
  const active = context.active()
  if (trace.getSpan(active) !== undefined) return active
  const extracted = propagation.extract(active, headers)
  return trace.getSpan(extracted) === undefined ? W3C.extract(active, headers, defaultTextMapGetter) : extracted
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

/**
 * Connections whose calls an instrumented undici leaves alone. Each call has a span of ours and its `traceparent`; the
 * instrumentation would add a second header, and a receiver reads the two as one invalid value.
 */
export function uninstrumented (dispatcher: Dispatcher): Dispatcher {
  return dispatcher.compose(dispatch => (options, handler) => context.with(UNTRACED, dispatch, undefined, options, handler))
}
