import { setImmediate as nextTurn } from 'node:timers/promises'

/** Longest time spent on one body before other requests get their turn, in milliseconds. */
const SLICE_MS = 4

/**
 * Lets long work on one body give way to the rest of the event loop. `due()` is cheap enough to ask after every
 * few hundred kilobytes; when it says yes, `await rest()`.
 */
export class Pace {
  #since = performance.now()

  due (): boolean {
    return performance.now() - this.#since > SLICE_MS
  }

  async rest (): Promise<void> {
    await nextTurn()
    this.#since = performance.now()
  }
}
