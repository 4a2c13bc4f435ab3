import type { BlockPool } from '../../cache/block-pool.ts'
import type { Sequence, SpilledKv } from '../sequence/sequence.ts'

/**
 * Keys and values of evicted sequences in host memory. A sequence that arrived by migration can't be computed again where
 * it runs (its features stayed elsewhere), so its blocks are copied out before others get them, and copied back when
 * there is room. A copy lives as long as its sequence waits, and no longer.
 */
export class KvSpill {
  readonly #pool: BlockPool

  constructor (pool: BlockPool) {
    this.#pool = pool
  }

  /** Copies the blocks that hold the computed tokens; nobody may be writing them. */
  save (sequence: Sequence, blockTokens: number): void {
    const used = sequence.blocks.slice(0, Math.ceil(sequence.computed / blockTokens))
    sequence.spilled = { blocks: used.map(block => this.#pool.bytes(block).slice()) }
  }

  /** Fills the sequence's new blocks but the first `found`, which have their content, and drops the copy. */
  restore (sequence: Sequence, found: number): void {
    const { blocks } = sequence.spilled as SpilledKv
    for (let i = found; i < blocks.length; i++) this.#pool.bytes(sequence.blocks[i] as number).set(blocks[i] as Uint8Array)
    sequence.spilled = undefined
  }
}
