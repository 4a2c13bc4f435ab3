export interface Cancellable {
  cancel (reason: unknown): void
}

/**
 * The requests in flight, and the work that outlives them: what a gateway that closes waits for. Not in Sets: the dead copies
 * of a busy one, once old, keep requests from being collected (10 us of CPU for a traced text request).
 */
export class InFlight {
  readonly #requests: Cancellable[] = []
  readonly #background: Array<Promise<unknown>> = []
  readonly #idle: Array<() => void> = []
  #closing = false

  /** No further request is taken. */
  get closing (): boolean {
    return this.#closing
  }

  get size (): number {
    return this.#requests.length
  }

  add (request: Cancellable): void {
    this.#requests.push(request)
  }

  delete (request: Cancellable): void {
    const at = this.#requests.indexOf(request)
    if (at !== -1) this.#requests.splice(at, 1)
    if (this.#requests.length === 0) for (const resolve of this.#idle.splice(0)) resolve()
  }

  /** Work that outlives its request, such as releasing leases; `settled` waits for it. */
  background (work: Promise<unknown>): void {
    const done = work.catch(() => {}).finally(() => { this.#background.splice(this.#background.indexOf(done), 1) })
    this.#background.push(done)
  }

  /**
   * Takes no more requests, and resolves when those in flight have ended: by themselves within `graceMs`, or by force.
   *
   * @param force gives the reason with which the rest is cancelled
   */
  async drain (graceMs: number, force: (requests: number) => unknown): Promise<void> {
    this.#closing = true
    if (this.#requests.length === 0) return
    const idle = new Promise<void>(resolve => { this.#idle.push(resolve) })
    const timer = setTimeout(() => {
      const reason = force(this.#requests.length)
      for (const request of [...this.#requests]) request.cancel(reason)
    }, graceMs)
    await idle
    clearTimeout(timer)
  }

  /** Resolves when no work is left in the background. */
  async settled (): Promise<void> {
    while (this.#background.length > 0) await Promise.all(this.#background)
  }
}
