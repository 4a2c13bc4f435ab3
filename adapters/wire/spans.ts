import { SpanStatusCode, type Span } from '@opentelemetry/api'
import { ATTR } from './semconv.ts'

let offset = performance.timeOrigin

/**
 * Unix time in milliseconds, to the microsecond, for the start and the end of a span (give both or neither). The SDK
 * alone stamps starts with whole milliseconds, and several steps of a request begin within one. The monotonic clock is
 * kept within the millisecond that the wall clock shows, so that it follows adjustments of the system's time.
 *
 * @param ago milliseconds before now
 */
export function spanTime (ago = 0): number {
  // The wall clock first: after a pause between the two, times would otherwise stand still until it has caught up.
  const [wall, mono] = [Date.now(), performance.now()]
  const behind = wall - (offset + mono)
  if (behind > 0) offset += behind
  else if (behind < -1) offset += behind + 1
  return offset + mono - ago
}

/** Error codes that mean the client went away: the gateway's, Node's, and an engine's. */
const ABORT_CODES: ReadonlySet<unknown> = new Set(['EPD_ERR_CLIENT_CLOSED_REQUEST', 'ABORT_ERR', 'cancelled'])

/**
 * Marks a span that did not end well with the error's code and message. A client that goes away is not an error: its
 * spans carry `epd.aborted` (undici's instrumentation has the same rule).
 */
export function failSpan (span: Span, error: unknown): void {
  const { code, name, message } = (error ?? {}) as { code?: unknown, name?: unknown, message?: unknown }
  if (ABORT_CODES.has(code) || name === 'AbortError') {
    span.setAttribute(ATTR.aborted, true)
    return
  }
  span.setAttribute(ATTR.errorType, typeof code === 'string' || typeof code === 'number' ? String(code) : typeof name === 'string' && name !== '' ? name : '_OTHER')
  span.setStatus({ code: SpanStatusCode.ERROR, message: typeof message === 'string' ? message : String(error) })
}
