/** When a node is probed next, and that it is probed once at a time. */
export interface ProbeTiming {
  readonly interval: number
  readonly backoff: number
  readonly backoffMax: number
  readonly timeout: number
}

/** `starting`: alive but not ready; asked again soon, without growing pauses. */
export type ProbeOutcome = 'well' | 'starting' | 'ill'

/** Up to a fifth more or less, so that gateways and nodes started together do not stay in step. */
function jitter (ms: number): number {
  return ms * (0.8 + 0.4 * Math.random())
}

/** A node that has just registered is probed this many times sooner than one that failed. */
const EAGER = 8

/** Probes one node for ever: at an interval while it is well, with back-off while it is not. */
export class ProbeLoop {
  readonly #timing: ProbeTiming
  readonly #probe: (signal: AbortSignal) => Promise<ProbeOutcome>
  #timer: NodeJS.Timeout | undefined
  #running: Promise<void> | undefined
  #abort: AbortController | undefined
  #again = false
  #closed = false
  #delay: number

  /** @param probe - never rejects. */
  constructor (timing: ProbeTiming, probe: (signal: AbortSignal) => Promise<ProbeOutcome>) {
    this.#timing = timing
    this.#probe = probe
    this.#delay = timing.backoff / EAGER
  }

  /** Probes now, and soon again should that fail. A probe under way is followed by another, as it may have begun before the news. */
  trigger (eager: boolean): void {
    if (this.#closed) return
    if (eager) this.#delay = this.#timing.backoff / EAGER
    if (this.#running !== undefined) {
      this.#again = true
      return
    }
    if (this.#timer !== undefined) clearTimeout(this.#timer)
    this.#running = this.#run()
  }

  async close (): Promise<void> {
    this.#closed = true
    if (this.#timer !== undefined) clearTimeout(this.#timer)
    this.#abort?.abort(new Error('the registry is closed'))
    await this.#running
  }

  async #run (): Promise<void> {
    this.#abort = new AbortController()
    const { signal } = this.#abort
    const timer = setTimeout(() => { this.#abort?.abort(new Error(`no answer within ${this.#timing.timeout} ms`)) }, this.#timing.timeout).unref()
    const outcome = await this.#probe(signal)
    clearTimeout(timer)
    this.#running = undefined
    if (this.#closed) return
    if (this.#again) {
      this.#again = false
      this.trigger(false)
      return
    }
    this.#timer = setTimeout(() => { this.trigger(false) }, jitter(this.#next(outcome))).unref()
  }

  #next (outcome: ProbeOutcome): number {
    const { interval, backoff, backoffMax } = this.#timing
    if (outcome !== 'ill') {
      this.#delay = backoff
      return outcome === 'well' ? interval : Math.min(backoff, interval)
    }
    const delay = this.#delay
    this.#delay = Math.min(backoffMax, delay * 2)
    return delay
  }
}
