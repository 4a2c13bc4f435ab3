/** What engines wait with: a promise that a signal cuts short, one with its two ends, and a line at a limited resource. */

/** The promise, or the signal's reason if the signal aborts first. The promise goes on for its other waiters. */
export async function abortable<T> (promise: Promise<T>, signal: AbortSignal | undefined): Promise<T> {
  if (signal === undefined) return await promise
  let onAbort = (): void => {}
  const aborted = new Promise<never>((_resolve, reject) => { onAbort = () => reject(signal.reason) })
  signal.throwIfAborted()
  signal.addEventListener('abort', onAbort, { once: true })
  try {
    return await Promise.race([promise, aborted])
  } finally {
    signal.removeEventListener('abort', onAbort)
  }
}

export interface Deferred<T> {
  readonly promise: Promise<T>
  resolve (value: T): void
  reject (error: unknown): void
}

/** A promise with its two ends; Node 20 has no Promise.withResolvers. A rejection without a listener is not an error. */
export function deferred<T> (): Deferred<T> {
  let resolve!: (value: T) => void
  let reject!: (error: unknown) => void
  const promise = new Promise<T>((_resolve, _reject) => {
    resolve = _resolve
    reject = _reject
  })
  promise.catch(() => {})
  return { promise, resolve, reject }
}

/** Lets `limit` callers in at once. The others wait in order, and leave the line when their signal aborts. */
export class Semaphore {
  readonly #limit: number
  #inside = 0
  readonly #line = new Set<() => void>()

  constructor (limit: number) {
    this.#limit = limit
  }

  get waiting (): number {
    return this.#line.size
  }

  /** Resolves with the function that leaves again; a second call of it does nothing. Rejects with the signal's reason. */
  async enter (signal?: AbortSignal): Promise<() => void> {
    signal?.throwIfAborted()
    if (this.#inside >= this.#limit) {
      const { promise, resolve } = deferred<undefined>()
      const turn = (): void => { resolve(undefined) }
      this.#line.add(turn)
      try {
        await abortable(promise, signal)
      } catch (reason) {
        // A turn that came together with the abort goes to the next in line.
        if (!this.#line.delete(turn)) this.#leave()
        throw reason
      }
    } else this.#inside++
    let left = false
    return () => {
      if (left) return
      left = true
      this.#leave()
    }
  }

  /** Hands the place to the next in line, so that a newcomer never overtakes it. */
  #leave (): void {
    const [next] = this.#line
    if (next === undefined) this.#inside--
    else {
      this.#line.delete(next)
      next()
    }
  }
}
