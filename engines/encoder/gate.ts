interface Waiter {
  enter (): void
}

/** Lets so many in at once; the others wait in order, and leave the line when their signal aborts. */
export class Gate {
  readonly #limit: number
  #inside = 0
  readonly #line = new Set<Waiter>()

  constructor (limit: number) {
    this.#limit = limit
  }

  get waiting (): number {
    return this.#line.size
  }

  /** Resolves with the function that leaves again, to be called once. Rejects with the signal's reason. */
  enter (signal: AbortSignal): Promise<() => void> {
    if (signal.aborted) return Promise.reject(signal.reason)
    if (this.#inside < this.#limit) return Promise.resolve(this.#admit())
    return new Promise((resolve, reject) => {
      const onAbort = (): void => {
        this.#line.delete(waiter)
        reject(signal.reason)
      }
      const waiter: Waiter = {
        enter: () => {
          signal.removeEventListener('abort', onAbort)
          resolve(this.#admit())
        }
      }
      signal.addEventListener('abort', onAbort, { once: true })
      this.#line.add(waiter)
    })
  }

  #admit (): () => void {
    this.#inside++
    let left = false
    return () => {
      if (left) return
      left = true
      this.#inside--
      const [next] = this.#line
      if (next === undefined) return
      this.#line.delete(next)
      next.enter()
    }
  }
}
