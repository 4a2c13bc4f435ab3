import { CacheError, type WaitOptions } from '../../cache/room-queue.ts'
import type { Sequence } from '../sequence/sequence.ts'

interface Claim {
  readonly settle: (found: number) => void
}

/** Migrating sequences that wait for KV blocks. Whose turn it is the scheduler knows: they stand in one line with those that wait to run. */
export class Claims {
  readonly #claims = new Map<Sequence, Claim>()

  get size (): number {
    return this.#claims.size
  }

  has (sequence: Sequence): boolean {
    return this.#claims.has(sequence)
  }

  /** In order of arrival. */
  get sequences (): Sequence[] {
    return [...this.#claims.keys()]
  }

  /** Resolves when `grant` is called for the sequence. Rejects with CacheError BUSY when time is over, or with the signal's reason. */
  async wait (sequence: Sequence, { signal, timeoutMs }: WaitOptions): Promise<number> {
    signal?.throwIfAborted()
    let timer: NodeJS.Timeout | undefined
    let onAbort = (): void => {}
    try {
      return await new Promise<number>((resolve, reject) => {
        timer = setTimeout(() => reject(new CacheError('BUSY', `no KV blocks for ${sequence.length} tokens within ${timeoutMs} ms`)), timeoutMs)
        onAbort = () => reject(signal?.reason)
        signal?.addEventListener('abort', onAbort, { once: true })
        this.#claims.set(sequence, { settle: resolve })
      })
    } finally {
      clearTimeout(timer)
      signal?.removeEventListener('abort', onAbort)
      this.#claims.delete(sequence)
    }
  }

  /** The sequence has its blocks, `found` of them with their content. */
  grant (sequence: Sequence, found: number): void {
    const claim = this.#claims.get(sequence)
    this.#claims.delete(sequence)
    claim?.settle(found)
  }
}
