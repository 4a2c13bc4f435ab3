import { CacheError, type WaitOptions } from '../../cache/room-queue.ts'
import { deferred } from '../../service/waiting.ts'
import type { Sequence } from '../sequence/sequence.ts'

/** Migrating sequences that wait for KV blocks. The scheduler decides whose turn it is, between them and those that wait to run. */
export class Reservations {
  readonly #waiting = new Map<Sequence, (found: number) => void>()

  get size (): number {
    return this.#waiting.size
  }

  has (sequence: Sequence): boolean {
    return this.#waiting.has(sequence)
  }

  /** In order of arrival. */
  get sequences (): Sequence[] {
    return [...this.#waiting.keys()]
  }

  /** Resolves when `grant` is called for the sequence. Rejects with CacheError BUSY after `timeoutMs`, or with the signal's reason. */
  async wait (sequence: Sequence, { signal, timeoutMs }: WaitOptions): Promise<number> {
    signal?.throwIfAborted()
    const { promise, resolve, reject } = deferred<number>()
    // Leaves at once: a sequence that gave up must not be granted blocks.
    const giveUp = (reason: unknown): void => {
      this.#waiting.delete(sequence)
      reject(reason)
    }
    const onAbort = (): void => giveUp(signal?.reason)
    const timer = setTimeout(() => giveUp(new CacheError('BUSY', `no KV blocks for ${sequence.length} tokens within ${timeoutMs} ms`)), timeoutMs)
    signal?.addEventListener('abort', onAbort, { once: true })
    this.#waiting.set(sequence, resolve)
    try {
      return await promise
    } finally {
      clearTimeout(timer)
      signal?.removeEventListener('abort', onAbort)
    }
  }

  /** The sequence has its blocks, and the content of the first `found`. */
  grant (sequence: Sequence, found: number): void {
    this.#waiting.get(sequence)?.(found)
    this.#waiting.delete(sequence)
  }
}
