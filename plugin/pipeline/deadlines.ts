import { LinkedList, type Linked } from './linked-list.ts'

/** Something that rings when its time has come, unless it is taken out before. */
export interface Alarm extends Linked {
  /** On the clock of `performance.now()`, in milliseconds. */
  at: number
  ring (): void
}

const TICK_MS = 50

/**
 * One coarse timer for all stages of all requests: a timer and a closure per stage cost more than the stage's own
 * bookkeeping, and timeouts of seconds can be late by a tick. Runs only while there is something to watch.
 */
export class Deadlines {
  readonly #alarms = new LinkedList<Alarm>()
  #timer: NodeJS.Timeout | undefined

  get size (): number {
    return this.#alarms.size
  }

  add (alarm: Alarm): void {
    this.#alarms.add(alarm)
    this.#timer ??= setInterval(() => { this.#tick() }, TICK_MS)
  }

  delete (alarm: Alarm): void {
    this.#alarms.delete(alarm)
  }

  close (): void {
    clearInterval(this.#timer)
    this.#timer = undefined
    for (const alarm of this.#alarms) this.#alarms.delete(alarm)
  }

  #tick (): void {
    if (this.#alarms.size === 0) {
      clearInterval(this.#timer)
      this.#timer = undefined
      return
    }
    const now = performance.now()
    for (const alarm of this.#alarms) {
      // One that rang before may have taken this one out.
      if (alarm.at <= now && this.#alarms.delete(alarm)) alarm.ring()
    }
  }
}
