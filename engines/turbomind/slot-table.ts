import type { BlockPool } from '../cache/block-pool.ts'
import type { BlockStats } from '../llm/blocks/block-manager.ts'
import type { Sequence } from '../llm/sequence/sequence.ts'
import { commonPrefix, keptTokens, type KeptTokens } from './kept-tokens.ts'

/** A slot for a sequence, whose first `reused` tokens have their keys and values in it already. */
export interface Place {
  readonly slot: number
  readonly reused: number
}

/**
 * The slots of the persistent batch. A slot is one contiguous KV region: a block of the pool that has room for a whole
 * session. It is free, in use by one sequence, or idle: it keeps the keys and values of a sequence that has ended, for
 * the next turn of the conversation, until its place is needed. Bookkeeping only, no tensors.
 */
export class SlotTable {
  readonly pool: BlockPool
  readonly #keep: boolean
  /** Slot -> what it keeps, least recently used first (a Map iterates in insertion order). */
  readonly #idle = new Map<number, KeptTokens>()
  /** Times an idle slot was given to a sequence that reuses nothing of it. */
  evictions = 0

  /** `keep: false`: a slot is free when its sequence has ended. */
  constructor (pool: BlockPool, options: { keep: boolean }) {
    this.pool = pool
    this.#keep = options.keep
  }

  get stats (): BlockStats {
    return { total: this.pool.total, free: this.pool.free, cached: this.#idle.size }
  }

  /** There is a slot for one more sequence. */
  get hasRoom (): boolean {
    return this.pool.free + this.#idle.size > 0
  }

  /** The idle slot with the longest reusable prefix, else a free one, else the least recently used idle one. Undefined when all are in use. */
  take (sequence: Sequence): Place | undefined {
    const best = this.#bestMatch(sequence)
    if (best !== undefined) {
      this.#idle.delete(best.slot)
      return best
    }
    const [free] = this.pool.allocate(1) ?? []
    if (free !== undefined) return { slot: free, reused: 0 }
    const [oldest] = this.#idle.keys()
    if (oldest === undefined) return undefined
    this.#idle.delete(oldest)
    this.evictions++
    return { slot: oldest, reused: 0 }
  }

  /** Overwriting an idle slot must save at least as many tokens as it discards. */
  #bestMatch (sequence: Sequence): Place | undefined {
    let best: Place | undefined
    for (const [slot, kept] of this.#idle) {
      const reused = commonPrefix(kept, sequence)
      if (reused > (best?.reused ?? 0) && kept.tokens.length - reused <= reused) best = { slot, reused }
    }
    return best
  }

  /** The sequence has ended: its slot becomes idle, or free when nothing was computed or the sequence failed. */
  giveBack (slot: number, sequence: Sequence): void {
    if (this.#idle.has(slot) || !this.pool.isAllocated(slot)) throw new Error(`slot ${slot} is not in use`)
    if (this.#keep && sequence.computed > 0 && sequence.outcome?.kind !== 'aborted') this.#idle.set(slot, keptTokens(sequence))
    else this.pool.release([slot])
  }

  /** Frees the idle slots. */
  clear (): void {
    this.pool.release([...this.#idle.keys()])
    this.#idle.clear()
  }

  /** Throws unless `used` are exactly the slots that are neither free nor idle. */
  checkIntegrity (used: readonly number[]): void {
    this.pool.checkIntegrity()
    if (new Set(used).size !== used.length) throw new Error('two sequences are in one slot')
    for (const slot of used) if (this.#idle.has(slot) || !this.pool.isAllocated(slot)) throw new Error(`slot ${slot} is in use and idle or free`)
    const { total, free, cached } = this.stats
    if (free + cached + used.length !== total) throw new Error(`${total - free - cached} slots are taken, ${used.length} are in use`)
  }
}
