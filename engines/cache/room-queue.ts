/** BUSY: no room within the given time, or too many already wait; try again later. TOO_LARGE: would never fit. */
export type CacheErrorCode = 'BUSY' | 'TOO_LARGE'

export class CacheError extends Error {
  override readonly name = 'CacheError'
  readonly code: CacheErrorCode

  constructor (code: CacheErrorCode, message: string) {
    super(message)
    this.code = code
  }
}

export interface WaitOptions {
  signal?: AbortSignal | undefined
  /** Rejects with BUSY after so many milliseconds. */
  timeoutMs: number
}

interface Waiter {
  blocks: number
  take: () => void
}

/**
 * Those who wait for blocks, served strictly in order: a large request is never overtaken for ever by small ones.
 * Bounded, because a queue without a bound turns an overload into a slow one.
 */
export class RoomQueue {
  readonly #waiters = new Set<Waiter>()
  readonly #limit: number
  readonly #room: () => number

  /** @param room how many blocks could be had just now */
  constructor (limit: number, room: () => number) {
    this.#limit = limit
    this.#room = room
  }

  get length (): number {
    return this.#waiters.size
  }

  /**
   * Resolves with what `take` returns, called when it is this waiter's turn and `blocks` fit; `take` runs before other
   * code can touch the blocks. Rejects with BUSY (queue full, or time over) or with the signal's reason.
   */
  wait<T> (blocks: number, take: () => T, options: WaitOptions): Promise<T> {
    if (options.signal?.aborted) return Promise.reject(options.signal.reason)
    if (this.#waiters.size >= this.#limit) {
      return Promise.reject(new CacheError('BUSY', `${this.#limit} requests already wait for cache blocks`))
    }
    return new Promise<T>((resolve, reject) => {
      const leave = (): void => {
        clearTimeout(timer)
        options.signal?.removeEventListener('abort', onAbort)
        this.#waiters.delete(waiter)
      }
      const waiter: Waiter = {
        blocks,
        take: () => {
          leave()
          try { resolve(take()) } catch (err) { reject(err) }
        }
      }
      const giveUp = (reason: unknown): void => {
        leave()
        reject(reason)
        // Those behind may need less.
        this.serve()
      }
      const onAbort = (): void => giveUp(options.signal?.reason)
      const timer = setTimeout(
        () => giveUp(new CacheError('BUSY', `no room for ${blocks} cache blocks within ${options.timeoutMs} ms`)),
        options.timeoutMs
      )
      options.signal?.addEventListener('abort', onAbort, { once: true })
      this.#waiters.add(waiter)
      this.serve()
    })
  }

  /** Serves waiters in order while the first one fits. Call it whenever there may be more room. */
  serve (): void {
    for (const waiter of this.#waiters) {
      if (waiter.blocks > this.#room()) return
      waiter.take()
    }
  }
}
