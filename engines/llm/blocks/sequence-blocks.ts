import type { BlockManager } from './block-manager.ts'
import { extendHashes } from './prefix-hash.ts'
import type { Sequence } from '../sequence/sequence.ts'

/**
 * The KV blocks of sequences: found or allocated, made findable, spilled, freed or left under a lease. When a sequence
 * gets or loses blocks is the scheduler's decision.
 *
 * A sequence that arrived by migration can't be recomputed here, because its features stayed in another engine. When it is
 * evicted its blocks are copied to host memory, and copied back when there is room.
 */
export class SequenceBlocks {
  readonly #blocks: BlockManager
  readonly #blockTokens: number
  /** Blocks of ended sequences that are still under a lease. */
  readonly #kept = new Set<readonly number[]>()
  /** Blocks that sequences without output have filled, until one with output finds them. */
  readonly #ahead = new Set<number>()

  constructor (blocks: BlockManager, blockTokens: number) {
    this.#blocks = blocks
    this.#blockTokens = blockTokens
  }

  /** Blocks for all tokens of a sequence: those found by `hashes`, then new ones. False when fewer than `spare` would be left. */
  take (sequence: Sequence, hashes: readonly string[], spare: number): boolean {
    const found = this.#blocks.match(hashes)
    const missing = Math.ceil(sequence.length / this.#blockTokens) - found.blocks
    if (missing + spare > this.#blocks.available - found.idle) return false
    sequence.blocks = hashes.slice(0, found.blocks).map(hash => this.#blocks.acquire(hash))
    if (sequence.maxTokens > 0) sequence.ahead = sequence.blocks.filter(block => this.#ahead.delete(block)).length * this.#blockTokens
    sequence.blocks.push(...this.#allocate(missing) as number[])
    sequence.committed = found.blocks
    return true
  }

  /** A block for the token it is about to write, unless its last block has room. False when no block can be allocated. */
  grow (sequence: Sequence): boolean {
    if (sequence.blocks.length > Math.floor(sequence.computed / this.#blockTokens)) return true
    const block = this.#allocate(1)
    if (block === undefined) return false
    sequence.blocks.push(...block)
    return true
  }

  #allocate (count: number): number[] | undefined {
    const blocks = this.#blocks.allocate(count)
    for (const block of blocks ?? []) this.#ahead.delete(block)
    return blocks
  }

  /** `computed` tokens are written: the full blocks enter the prefix cache. */
  computed (sequence: Sequence, computed: number): void {
    sequence.computed = computed
    const full = Math.floor(computed / this.#blockTokens)
    if (full <= sequence.committed) return
    extendHashes(sequence, this.#blockTokens, full * this.#blockTokens)
    for (let i = sequence.committed; i < full; i++) {
      const block = sequence.blocks[i] as number
      this.#blocks.commit(block, sequence.hashes[i] as string)
      if (sequence.maxTokens === 0) this.#ahead.add(block)
    }
    sequence.committed = full
  }

  /** After `take`: counts the cached prefix as computed, or restores what was spilled. */
  begin (sequence: Sequence): void {
    const found = sequence.committed
    if (sequence.spilled === undefined) {
      sequence.computed = found * this.#blockTokens
      return
    }
    this.#restore(sequence, found)
    this.computed(sequence, sequence.length - 1)
  }

  /** Frees the blocks for an older sequence, after a copy if they can't be recomputed. No forward pass may be writing them. */
  evict (sequence: Sequence): void {
    if (sequence.migration !== undefined) this.#spill(sequence)
    this.#free(sequence)
  }

  #spill (sequence: Sequence): void {
    const used = sequence.blocks.slice(0, Math.ceil(sequence.computed / this.#blockTokens))
    sequence.spilled = used.map(block => this.#blocks.pool.bytes(block).slice())
  }

  /** Fills the new blocks but the first `found`, which have their content, and drops the copy. */
  #restore (sequence: Sequence, found: number): void {
    sequence.spilled?.forEach((bytes, i) => { if (i >= found) this.#blocks.pool.bytes(sequence.blocks[i] as number).set(bytes) })
    sequence.spilled = undefined
  }

  /** The sequence has ended. Its blocks are freed, or with `keep` stay referenced until its callback releases them. */
  end (sequence: Sequence): void {
    const { keep, outcome, blocks } = sequence
    sequence.spilled = undefined
    if (keep === undefined || (outcome?.kind !== 'stop' && outcome?.kind !== 'length')) return this.#free(sequence)
    sequence.blocks = []
    this.#kept.add(blocks)
    const release = (): void => { if (this.#kept.delete(blocks)) this.#blocks.release(blocks) }
    keep(sequence, { blocks, release })
  }

  #free (sequence: Sequence): void {
    if (sequence.broken) this.#blocks.forget(sequence.blocks)
    this.#blocks.release(sequence.blocks)
    sequence.blocks = []
    sequence.computed = 0
    sequence.committed = 0
  }

  /** Throws unless every reference belongs to one of these sequences or to a lease. */
  checkIntegrity (sequences: readonly Sequence[]): void {
    this.#blocks.checkIntegrity([...sequences.map(s => s.blocks), ...this.#kept])
    for (const s of sequences) if (s.spilled !== undefined) throw new Error(`sequence ${s.id} has KV blocks and a copy of them`)
  }
}
