/** The two kinds of blocks an engine keeps: encoder output, and keys and values. */
export type PoolName = 'feature' | 'kv'

export interface BlockPoolOptions {
  name: PoolName
  /** How many blocks the pool holds; fixed for its life. */
  numBlocks: number
  /** Size of one block in bytes; a multiple of 8, so that every block is aligned for any element type. */
  blockBytes: number
}

/**
 * Fixed-size blocks in one SharedArrayBuffer. The pool is bookkeeping only: it says which block is whose turn, and never
 * reads or writes one. Threads that do get `sab` once and block ids from then on.
 */
export class BlockPool {
  readonly name: PoolName
  readonly blockBytes: number
  readonly total: number
  readonly sab: SharedArrayBuffer
  readonly #free: number[] = []
  readonly #used: Uint8Array

  constructor (options: BlockPoolOptions) {
    const { name, numBlocks, blockBytes } = options
    if (!Number.isSafeInteger(numBlocks) || numBlocks < 1) throw new RangeError(`pool ${name}: numBlocks must be a positive integer`)
    if (!Number.isSafeInteger(blockBytes) || blockBytes < 8 || blockBytes % 8 !== 0) {
      throw new RangeError(`pool ${name}: blockBytes must be a positive multiple of 8`)
    }
    this.name = name
    this.blockBytes = blockBytes
    this.total = numBlocks
    this.sab = new SharedArrayBuffer(numBlocks * blockBytes)
    this.#used = new Uint8Array(numBlocks)
    // A stack, lowest id on top: blocks just freed are taken next, while their memory is still in a cache.
    for (let id = numBlocks - 1; id >= 0; id--) this.#free.push(id)
  }

  /** Number of free blocks. */
  get free (): number {
    return this.#free.length
  }

  /** Takes `count` blocks, or none at all: undefined when there are not as many. Contents are whatever was there. */
  allocate (count: number): number[] | undefined {
    if (!Number.isSafeInteger(count) || count < 0) throw new RangeError(`pool ${this.name}: cannot allocate ${count} blocks`)
    if (count > this.#free.length) return undefined
    const ids: number[] = []
    for (let i = 0; i < count; i++) {
      const id = this.#free.pop() as number
      this.#used[id] = 1
      ids.push(id)
    }
    return ids
  }

  /** Gives blocks back. Throws, and frees nothing, if any of them is not allocated: a double free is a bug, never routine. */
  release (ids: readonly number[]): void {
    const seen = new Set<number>()
    for (const id of ids) {
      if (this.#used[id] !== 1 || seen.has(id)) throw new Error(`pool ${this.name}: block ${id} is not allocated (double free?)`)
      seen.add(id)
    }
    for (const id of ids) {
      this.#used[id] = 0
      this.#free.push(id)
    }
  }

  isAllocated (id: number): boolean {
    return this.#used[id] === 1
  }

  /** A view of one block's bytes, shared with every other thread that has one. */
  bytes (id: number): Uint8Array {
    if (!(id >= 0 && id < this.total)) throw new RangeError(`pool ${this.name}: no block ${id}`)
    return new Uint8Array(this.sab, id * this.blockBytes, this.blockBytes)
  }

  /** Throws unless every block is exactly once either free or allocated. For tests and for an idle engine. */
  checkIntegrity (): void {
    const free = new Set(this.#free)
    if (free.size !== this.#free.length) throw new Error(`pool ${this.name}: a block is free twice`)
    for (let id = 0; id < this.total; id++) {
      if (free.has(id) === (this.#used[id] === 1)) throw new Error(`pool ${this.name}: block ${id} is both free and allocated, or neither`)
    }
  }
}
