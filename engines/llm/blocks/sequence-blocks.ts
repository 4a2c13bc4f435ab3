import type { BlockManager } from './block-manager.ts'
import { KvSpill } from './kv-spill.ts'
import { extendHashes } from './prefix-hash.ts'
import type { Sequence } from '../sequence/sequence.ts'

/** How sequences come by KV blocks, make them findable, lose them and leave them. Who gets them when is the scheduler's. */
export class SequenceBlocks {
  readonly #blocks: BlockManager
  readonly #blockTokens: number
  /** Blocks that ended sequences left to whoever keeps them. */
  readonly #kept = new Set<readonly number[]>()
  readonly #spill: KvSpill

  constructor (blocks: BlockManager, blockTokens: number) {
    this.#blocks = blocks
    this.#blockTokens = blockTokens
    this.#spill = new KvSpill(blocks.pool)
  }

  /** Blocks for all tokens of a sequence: those found by `hashes`, then new ones. False: not without touching `spare` others. */
  take (sequence: Sequence, hashes: readonly string[], spare: number): boolean {
    const found = this.#blocks.match(hashes)
    const missing = Math.ceil(sequence.length / this.#blockTokens) - found.blocks
    if (missing + spare > this.#blocks.available - found.idle) return false
    sequence.blocks = hashes.slice(0, found.blocks).map(hash => this.#blocks.acquire(hash))
    sequence.blocks.push(...this.#blocks.allocate(missing) as number[])
    sequence.committed = found.blocks
    return true
  }

  /** The block for the token it is about to write, if it lacks it. False: there is none. */
  grow (sequence: Sequence): boolean {
    if (sequence.blocks.length > Math.floor(sequence.computed / this.#blockTokens)) return true
    const block = this.#blocks.allocate(1)
    if (block === undefined) return false
    sequence.blocks.push(...block)
    return true
  }

  /** `computed` tokens are written: what is full can be found from now on. */
  computed (sequence: Sequence, computed: number): void {
    sequence.computed = computed
    const full = Math.floor(computed / this.#blockTokens)
    if (full <= sequence.committed) return
    extendHashes(sequence, this.#blockTokens, full * this.#blockTokens)
    for (let i = sequence.committed; i < full; i++) this.#blocks.commit(sequence.blocks[i] as number, sequence.hashes[i] as string)
    sequence.committed = full
  }

  /** After `take`: what it begins with, or, spilled before, goes on with. */
  begin (sequence: Sequence): void {
    const found = sequence.committed
    if (sequence.spilled === undefined) {
      sequence.computed = found * this.#blockTokens
      return
    }
    this.#spill.restore(sequence, found)
    this.computed(sequence, sequence.length - 1)
  }

  /** An older sequence needs its blocks. One that arrived by migration is copied out, any other computed again. */
  evict (sequence: Sequence): void {
    if (sequence.migration !== undefined) this.#spill.save(sequence, this.#blockTokens)
    this.#free(sequence)
  }

  /** It has ended. What it is to leave when it ended well stays referenced until its keeper releases it. */
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
    this.#blocks.release(sequence.blocks)
    sequence.blocks = []
    sequence.computed = 0
    sequence.committed = 0
  }

  /** Throws unless every reference is one of these sequences', or of a keeper. */
  checkIntegrity (sequences: readonly Sequence[]): void {
    this.#blocks.checkIntegrity([...sequences.map(s => s.blocks), ...this.#kept])
    for (const s of sequences) if (s.spilled !== undefined) throw new Error(`sequence ${s.id} has KV blocks and a copy of them`)
  }
}
