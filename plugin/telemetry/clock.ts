let offset = performance.timeOrigin
/** When the wall clock was last looked at, on the monotonic one. */
let looked = -Infinity
const LOOK_EVERY_MS = 5

/**
 * Milliseconds of Unix time, to the microsecond, for starts and ends of spans. The SDK alone stamps starts with
 * Date.now(): whole milliseconds, in which planning and the call after it begin at once and stand in a trace in any
 * order. The monotonic clock is kept within the millisecond that the wall clock shows, so that it follows adjustments
 * of the system's time.
 *
 * @param ago milliseconds before now
 */
export function spanTime (ago = 0): number {
  const mono = performance.now()
  if (mono - looked >= LOOK_EVERY_MS) {
    looked = mono
    const behind = Date.now() - (offset + mono)
    if (behind > 0) offset += behind
    else if (behind < -1) offset += behind + 1
  }
  return offset + mono - ago
}
