/** Pauses between attempts: each twice as long as the one before, up to the longest. */
export class Backoff {
  readonly #first: number
  readonly #longest: number
  #next: number

  constructor (first: number, longest: number) {
    this.#first = this.#next = first
    this.#longest = longest
  }

  /** Milliseconds to wait after a failure. */
  pause (): number {
    const pause = this.#next
    this.#next = Math.min(pause * 2, this.#longest)
    return pause
  }

  /** It worked: the next pause is the first again. */
  reset (): void {
    this.#next = this.#first
  }
}
