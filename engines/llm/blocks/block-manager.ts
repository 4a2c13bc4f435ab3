import type { BlockPool } from '../../cache/block-pool.ts'

export interface BlockStats {
  readonly total: number
  readonly free: number
  /** Unreferenced blocks that can be found by their hash, and evicted. */
  readonly cached: number
}

/**
 * KV blocks: how many references each has, and which can be found by the hash of the prefix they end. Bookkeeping only, no
 * tensors. A block is free, cached (hashed, unreferenced), or referenced; free and cached ones can be allocated.
 */
export class BlockManager {
  readonly pool: BlockPool
  readonly #caching: boolean
  readonly #refs: Int32Array
  readonly #hashOf: Array<string | undefined>
  readonly #byHash = new Map<string, number>()
  /** Cached blocks, least recently released first (a Set iterates in insertion order). */
  readonly #idle = new Set<number>()

  /** `caching: false`: no block outlives its last reference. */
  constructor (pool: BlockPool, options: { caching: boolean }) {
    this.pool = pool
    this.#caching = options.caching
    this.#refs = new Int32Array(pool.total)
    this.#hashOf = new Array<string | undefined>(pool.total)
  }

  get stats (): BlockStats {
    return { total: this.pool.total, free: this.pool.free, cached: this.#idle.size }
  }

  /** Blocks that `allocate` could give now. */
  get available (): number {
    return this.pool.free + this.#idle.size
  }

  /** How many leading hashes are cached, and how many of those blocks are unreferenced (`acquire` takes them from `available`). */
  match (hashes: readonly string[]): { blocks: number, idle: number } {
    let blocks = 0
    let idle = 0
    for (const hash of hashes) {
      const block = this.#byHash.get(hash)
      if (block === undefined) break
      blocks++
      if (this.#idle.has(block)) idle++
    }
    return { blocks, idle }
  }

  /** References the block with this hash, which `match` has just found. */
  acquire (hash: string): number {
    const block = this.#byHash.get(hash)
    if (block === undefined) throw new Error('block is not cached')
    this.#idle.delete(block)
    this.#ref(block, 1)
    return block
  }

  /** New blocks with one reference each, evicting cached ones as needed; undefined when fewer are available. */
  allocate (count: number): number[] | undefined {
    if (count > this.available) return undefined
    for (const block of this.#idle) {
      if (this.pool.free >= count) break
      this.#forget(block)
      this.pool.release([block])
    }
    const blocks = this.pool.allocate(count)
    for (const block of blocks ?? []) this.#ref(block, 1)
    return blocks
  }

  /** The block is full and written: it becomes findable, unless another block with the same content already is. */
  commit (block: number, hash: string): void {
    if ((this.#refs[block] as number) < 1) throw new Error(`KV block ${block} is committed but not referenced`)
    if (!this.#caching || this.#byHash.has(hash) || this.#hashOf[block] !== undefined) return
    this.#byHash.set(hash, block)
    this.#hashOf[block] = hash
  }

  /** Drops one reference of each, last block first: a prefix must outlive what builds on it. */
  release (blocks: readonly number[]): void {
    for (let i = blocks.length - 1; i >= 0; i--) {
      const block = blocks[i] as number
      if ((this.#refs[block] as number) < 1) throw new Error(`KV block ${block} is released more often than referenced`)
      this.#ref(block, -1)
      if (this.#refs[block] !== 0) continue
      if (this.#hashOf[block] !== undefined) this.#idle.add(block)
      else this.pool.release([block])
    }
  }

  /** Blocks of a holder that are not to be found any more: each is free with its last reference. */
  forget (blocks: readonly number[]): void {
    for (const block of blocks) this.#forget(block)
  }

  /** Forgets every cached prefix; referenced blocks are free with their last reference. */
  clear (): void {
    const idle = [...this.#idle]
    for (const block of this.#byHash.values()) this.#hashOf[block] = undefined
    this.#byHash.clear()
    this.#idle.clear()
    this.pool.release(idle)
  }

  #ref (block: number, by: 1 | -1): void {
    this.#refs[block] = (this.#refs[block] as number) + by
  }

  #forget (block: number): void {
    const hash = this.#hashOf[block]
    if (hash !== undefined) this.#byHash.delete(hash)
    this.#hashOf[block] = undefined
    this.#idle.delete(block)
  }

  /** Throws unless the references are exactly those of `holders` (each a list of blocks) and every block is accounted for. */
  checkIntegrity (holders: Iterable<readonly number[]>): void {
    this.pool.checkIntegrity()
    const refs = new Int32Array(this.pool.total)
    for (const blocks of holders) for (const block of blocks) refs[block] = (refs[block] as number) + 1
    for (let block = 0; block < this.pool.total; block++) {
      const held = refs[block] as number
      if (held !== this.#refs[block]) throw new Error(`KV block ${block} has ${this.#refs[block]} references, sequences hold ${held}`)
      const idle = this.#idle.has(block)
      if (idle && (held > 0 || this.#hashOf[block] === undefined)) throw new Error(`KV block ${block} is idle but held or without hash`)
      if (this.pool.isAllocated(block) !== (held > 0 || idle)) throw new Error(`KV block ${block} leaks, or is free and in use`)
      const hash = this.#hashOf[block]
      if (hash !== undefined && this.#byHash.get(hash) !== block) throw new Error(`KV block ${block} has a hash that does not lead to it`)
    }
    for (const [hash, block] of this.#byHash) if (this.#hashOf[block] !== hash) throw new Error('a hash leads to a block without it')
  }
}
