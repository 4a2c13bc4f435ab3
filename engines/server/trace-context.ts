import { ROOT_CONTEXT, type Context } from '@opentelemetry/api'
import { W3CTraceContextPropagator } from '@opentelemetry/core'

export const PROPAGATOR = new W3CTraceContextPropagator()

/** The caller's trace context from HTTP headers. Works without an SDK, so that it can be handed on. */
export function contextOf (headers: Readonly<Record<string, string | string[] | undefined>>): Context {
  return PROPAGATOR.extract(ROOT_CONTEXT, headers, {
    keys: carrier => Object.keys(carrier as object),
    get: (carrier, key) => (carrier as typeof headers)[key]
  })
}
