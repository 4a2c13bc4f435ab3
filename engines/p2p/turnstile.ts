/** Lets so many through at a time, the others in order as somebody leaves. */
export class Turnstile {
  #free: number
  readonly #queue: Array<() => void> = []

  constructor (limit: number) {
    this.#free = limit
  }

  async enter (): Promise<void> {
    if (this.#free > 0) this.#free--
    else await new Promise<void>((resolve) => this.#queue.push(resolve))
  }

  leave (): void {
    const next = this.#queue.shift()
    if (next === undefined) this.#free++
    else next()
  }
}
