import { SpanStatusCode, type Span } from '@opentelemetry/api'
import { ENGINE_ATTR } from './engine-semconv.ts'

/**
 * What a span tells that did not end well: the error's code and its words; or that the client went away, which is no
 * error (the gateway's spans have the same rule).
 */
export function failSpan (span: Span, error: unknown): void {
  const { code, name, message } = (error ?? {}) as { code?: unknown, name?: unknown, message?: unknown }
  if (code === 'cancelled' || name === 'AbortError') {
    span.setAttribute(ENGINE_ATTR.aborted, true)
    return
  }
  span.setAttribute(ENGINE_ATTR.errorType, typeof code === 'string' ? code : typeof name === 'string' ? name : '_OTHER')
  span.setStatus({ code: SpanStatusCode.ERROR, ...(typeof message === 'string' ? { message } : {}) })
}
