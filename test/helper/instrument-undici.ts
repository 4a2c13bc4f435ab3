import { subscribe, unsubscribe } from 'node:diagnostics_channel'
import { context, propagation, SpanKind, trace } from '@opentelemetry/api'
import type { Test } from 'tap'

/** What @opentelemetry/instrumentation-undici does to a request. */
export function instrumentUndici (t: Test): void {
  const onCreate = (message: unknown): void => {
    const { request } = message as { request: { method: string, addHeader: (name: string, value: string) => void } }
    const span = trace.getTracer('undici').startSpan(request.method, { kind: SpanKind.CLIENT }, context.active())
    const headers: Record<string, string> = {}
    propagation.inject(trace.setSpan(context.active(), span), headers)
    for (const [name, value] of Object.entries(headers)) request.addHeader(name, value)
    span.end()
  }
  subscribe('undici:request:create', onCreate)
  t.teardown(() => unsubscribe('undici:request:create', onCreate))
}
