import type { HrTime } from '@opentelemetry/api'

let offset = performance.timeOrigin

/**
 * Wall-clock time to the microsecond: for `startTime` of startSpan and the argument of `end` (give both or neither).
 * The SDK alone stamps starts with whole milliseconds, in which several steps of a request may lie. The monotonic clock
 * is kept within the millisecond that the wall clock shows, so that it follows adjustments of the system's time.
 */
export function spanTime (): HrTime {
  const mono = performance.now()
  const behind = Date.now() - (offset + mono)
  if (behind > 0) offset += behind
  else if (behind < -1) offset += behind + 1
  const ms = offset + mono
  const seconds = Math.floor(ms / 1_000)
  return [seconds, Math.floor((ms - seconds * 1_000) * 1e6)]
}
