import { subscribe, unsubscribe } from 'node:diagnostics_channel'
import { context, createContextKey, propagation, trace, type Context } from '@opentelemetry/api'

/** Marks contexts made here, so that only this gateway's own upstream calls are looked at. */
const kOurs = createContextKey('fastify-epd.upstream')
const CHANNEL = 'undici:request:create'
/** A comma is where two headers were joined. */
const TRACEPARENT = /^(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(?:$|-[^,]*$)/
const LENGTH_00 = 55
const TRACE_FIELDS = ['traceparent', 'tracestate'] as const

export type IncomingHeaders = Readonly<Record<string, string | string[] | undefined>>

/** The caller's context: an active span's (another instrumentation made it), else what the request's headers carry. */
export function parentContext (headers: IncomingHeaders): Context {
  const active = context.active()
  return trace.getSpan(active) === undefined ? propagation.extract(active, headers) : active
}

/**
 * `from` marked as belonging to an upstream call of ours. It, and all contexts made from it, are links of a chain: the
 * API's own copy everything they inherit, and a request makes half a dozen.
 */
export function upstreamContext (from: Context): Context {
  return new ChainedContext(from, kOurs, true)
}

class ChainedContext implements Context {
  readonly #parent: Context
  readonly #key: symbol
  readonly #value: unknown

  constructor (parent: Context, key: symbol, value: unknown) {
    this.#parent = parent
    this.#key = key
    this.#value = value
  }

  getValue (key: symbol): unknown {
    return key === this.#key ? this.#value : this.#parent.getValue(key)
  }

  setValue (key: symbol, value: unknown): Context {
    return new ChainedContext(this, key, value)
  }

  deleteValue (key: symbol): Context {
    return new ChainedContext(this, key, undefined)
  }
}

/**
 * Trace headers for an upstream call within `from`. Without an SDK there is no span of ours to name: the client's
 * own headers then pass through unchanged, as a transparent intermediary's should.
 */
export function propagationHeaders (from: Context, incoming: IncomingHeaders): Record<string, string> {
  const headers: Record<string, string> = {}
  // Propagators check by themselves that the span is a valid one.
  if (trace.getSpanContext(from) !== undefined) propagation.inject(from, headers)
  if (headers.traceparent === undefined) forward(incoming, headers)
  return headers
}

/** Trace id of the client's `traceparent`, when it has a well-formed one. */
export function callersTraceId ({ traceparent }: IncomingHeaders): string | undefined {
  return isTraceparent(traceparent) ? traceparent.slice(3, 35) : undefined
}

/** Version 00 ends after its flags, later ones may go on. */
function isTraceparent (value: unknown): value is string {
  return typeof value === 'string' && TRACEPARENT.test(value) && (value.length === LENGTH_00 || !value.startsWith('00'))
}

function forward (incoming: IncomingHeaders, headers: Record<string, string>): void {
  const { traceparent, tracestate } = incoming
  // Anything else (two headers joined by a comma, garbage) would only be thrown away further on.
  if (!isTraceparent(traceparent)) return
  headers.traceparent = traceparent
  if (typeof tracestate === 'string') headers.tracestate = tracestate
}

let users = 0

/**
 * Keeps exactly one `traceparent` on each upstream call, whether or not undici is instrumented too: the
 * instrumentation adds its own to the one the call already has, and a receiver reads the two as one invalid value.
 * The instrumentation's is a child of ours, so ours goes. Call it after the SDK is up (subscribers run in order)
 * and call what it returns when the gateway closes.
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
