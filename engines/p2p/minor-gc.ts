import { setFlagsFromString } from 'node:v8'
import { runInNewContext } from 'node:vm'

type Collect = (options: { type: 'minor' }) => void

/** Bytes of received messages between two collections. */
const STEP_BYTES = 16 << 20

/**
 * Every received chunk is memory outside of V8's heap that lives until a tiny object is collected. Left to itself V8 answers
 * such memory with major collections, each marking the worker's whole heap: a third of the CPU of a transfer. The objects
 * die young, so a minor collection now and then frees the same memory for next to nothing, and keeps it bounded too.
 */
export function collectReceived (): (bytes: number) => void {
  const collect = findCollect()
  let since = 0
  return (bytes) => {
    since += bytes
    if (since < STEP_BYTES) return
    since = 0
    collect?.({ type: 'minor' })
  }
}

/** V8 has the function only in contexts made while the flag is on. Other contexts and threads must not see it. */
function findCollect (): Collect | undefined {
  try {
    setFlagsFromString('--expose-gc')
    const collect: unknown = runInNewContext('gc')
    setFlagsFromString('--no-expose-gc')
    return typeof collect === 'function' ? collect as Collect : undefined
  } catch {
    return undefined
  }
}
