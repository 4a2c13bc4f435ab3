/** Times as a line over work, fitted to samples. */

/** Weight of what was known when a sample comes: the last 50 count. */
const KEEP = 0.98
/** Fewer samples say nothing. */
const ENOUGH = 8
/** How much the amounts of work must differ, against their mean, before their times say what a token adds. */
const SPREAD = 0.05

/** Milliseconds by work, as a line: a part that is fixed, and one for each token. Least squares; old samples fade. */
export class TimeLine {
  #samples = 0
  #n = 0
  #x = 0
  #y = 0
  #xx = 0
  #xy = 0

  add (work: number, ms: number): void {
    this.#samples++
    this.#n = KEEP * this.#n + 1
    this.#x = KEEP * this.#x + work
    this.#y = KEEP * this.#y + ms
    this.#xx = KEEP * this.#xx + work * work
    this.#xy = KEEP * this.#xy + work * ms
  }

  /** Undefined before enough was measured. */
  at (work: number): number | undefined {
    if (this.#samples < ENOUGH) return undefined
    const x = this.#x / this.#n
    const y = this.#y / this.#n
    if (x === 0) return y
    // Where all had about the same work, time is taken to grow with it.
    const weight = SPREAD * x * x
    const slope = (this.#xy / this.#n - x * y + weight * y / x) / (this.#xx / this.#n - x * x + weight)
    return y + Math.min(y / x, Math.max(0, slope)) * (work - x)
  }
}

/** Of one model, and the nodes of one role that begin its answers. */
export interface StageTimes {
  /** At encoders, by the work of `workAtEncoders`. */
  readonly encode: TimeLine
  /** From the call to the first token, by that of `workAt`: of a node that gets features, pull and prefill. */
  readonly fed: TimeLine
  /** Of one that encodes by itself, vision and prefill. */
  readonly own: TimeLine
  /** Requests with media that have begun. */
  begun: number
}
