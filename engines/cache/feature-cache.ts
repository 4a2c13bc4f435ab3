import type { BlockPool } from './block-pool.ts'
import { CacheError, RoomQueue, type WaitOptions } from './room-queue.ts'

export interface FeatureMeta {
  /** How many tokens the features stand for. */
  numTokens: number
  /** Tiles as [rows, columns], where the model family has them. */
  grid?: readonly number[] | undefined
}

/** One media item's features: the handle by which they are held and given back. */
export interface FeatureEntry extends FeatureMeta {
  readonly hash: string
  readonly blocks: readonly number[]
  /** How many leases and sequences hold these blocks. */
  readonly refs: number
  readonly state: 'pending' | 'ready' | 'dead'
}

export interface FeatureCacheStats {
  total: number
  free: number
  /** Blocks of entries that can be found, and evicted because no holder is left. */
  cached: number
  /** Blocks that are held, being filled, or waiting for their last holder. free + cached + referenced == total. */
  referenced: number
}

interface Entry extends FeatureMeta {
  hash: string
  blocks: number[]
  refs: number
  state: 'pending' | 'ready' | 'dead'
  /** The encoder may still write the blocks: true until `commit` or `abandon`, also after a `clear()`. */
  filling: boolean
}

/** @default 256 requests may wait for blocks */
export const DEFAULT_MAX_WAITING = 256

/**
 * Feature blocks, found by content hash. An entry is `pending` while it is filled, `ready` once committed, and `dead` when
 * it can't be found any more (abandoned or cleared) but is still held. Only ready entries without holders are evicted,
 * least recently used first. Holders keep the entry, not the hash: after `clear()` the same hash may mean other blocks.
 */
export class FeatureCache {
  readonly pool: BlockPool
  readonly #index = new Map<string, Entry>()
  /** Ready and unreferenced entries, least recently used first (a Set iterates in insertion order). */
  readonly #idle = new Set<Entry>()
  readonly #queue: RoomQueue
  /** Every entry that has blocks, dead ones included. */
  readonly #entries = new Set<Entry>()
  #cachedBlocks = 0
  /** Called when a caller has to wait for room. */
  onShortage: (() => void) | undefined

  constructor (pool: BlockPool, options: { maxWaiting?: number } = {}) {
    this.pool = pool
    this.#queue = new RoomQueue(options.maxWaiting ?? DEFAULT_MAX_WAITING, () => this.#room())
  }

  get stats (): FeatureCacheStats {
    const { total, free } = this.pool
    return { total, free, cached: this.#cachedBlocks, referenced: total - free - this.#cachedBlocks }
  }

  /** How many callers wait for room. */
  get waiting (): number {
    return this.#queue.length
  }

  /** The entry for a content hash, pending or ready; counts as a use. */
  lookup (hash: string): FeatureEntry | undefined {
    const entry = this.#index.get(hash)
    if (entry !== undefined && this.#idle.delete(entry)) this.#idle.add(entry)
    return entry
  }

  /**
   * A new pending entry with `blocks` blocks, evicting idle ones as needed; undefined when there is no room, or when others
   * wait for it already. It has no holder yet, but can't be evicted before `commit`. Throws if the hash is there already.
   */
  reserve (hash: string, blocks: number, meta: FeatureMeta): FeatureEntry | undefined {
    if (this.#queue.length > 0 || blocks > this.#room()) return undefined
    return this.#take(hash, blocks, meta)
  }

  /**
   * Like `reserve`, but waits in line for room. Rejects with CacheError BUSY (time over, too many wait) or TOO_LARGE (more
   * blocks than the pool has), or with the signal's reason. Throws if the hash came to be there meanwhile.
   */
  reserveOrWait (hash: string, blocks: number, meta: FeatureMeta, options: WaitOptions): Promise<FeatureEntry> {
    return this.#wait(blocks, () => this.#take(hash, blocks, meta), options)
  }

  /** Resolves once `blocks` blocks could be reserved at that moment; `reserveOrWait` also keeps them. */
  waitForRoom (blocks: number, options: WaitOptions): Promise<void> {
    return this.#wait(blocks, () => {}, options)
  }

  /** The blocks are filled: from now on they may be read, and evicted when they have no holder. */
  commit (entry: FeatureEntry): void {
    const own = this.#filled(entry)
    if (own.state === 'pending') own.state = 'ready'
    this.#settle(own)
  }

  /** Filling failed: the entry is gone from the index, and its blocks are free once its last holder is gone. */
  abandon (entry: FeatureEntry): void {
    const own = this.#filled(entry)
    this.#bury(own)
  }

  /** Holds an entry; each `ref` needs exactly one `unref`. */
  ref (entry: FeatureEntry): void {
    const own = entry as Entry
    if (!this.#entries.has(own)) throw new Error(`features ${own.hash}: held after the end`)
    own.refs++
    if (this.#idle.delete(own)) this.#cachedBlocks -= own.blocks.length
  }

  unref (entry: FeatureEntry): void {
    const own = entry as Entry
    if (own.refs < 1) throw new Error(`features ${own.hash}: released more often than held`)
    own.refs--
    this.#settle(own)
  }

  /** The entry is not found any more, so that the next request makes it anew; its holders keep it. */
  forget (entry: FeatureEntry): void {
    if (entry.state === 'ready') this.#bury(entry as Entry)
  }

  /** Forgets everything: idle blocks are free at once, held ones with their last `unref`, pending ones are never found. */
  clear (): void {
    for (const entry of [...this.#index.values()]) this.#bury(entry)
  }

  /** Throws unless every allocated block belongs to exactly one entry and the counts add up. For tests and an idle engine. */
  checkIntegrity (): void {
    this.pool.checkIntegrity()
    let held = 0
    let cached = 0
    for (const entry of this.#entries) {
      held += entry.blocks.length
      const idle = entry.state === 'ready' && entry.refs === 0
      if (idle) cached += entry.blocks.length
      if (idle !== this.#idle.has(entry)) throw new Error(`features ${entry.hash}: evictable and held at once, or neither`)
      if ((this.#index.get(entry.hash) === entry) !== (entry.state !== 'dead')) throw new Error(`features ${entry.hash}: index and state disagree`)
      for (const id of entry.blocks) if (!this.pool.isAllocated(id)) throw new Error(`features ${entry.hash}: block ${id} was freed`)
    }
    if (cached !== this.#cachedBlocks) throw new Error(`feature cache: ${cached} blocks are cached, ${this.#cachedBlocks} are counted`)
    if (held !== this.pool.total - this.pool.free) throw new Error('feature cache: blocks were lost, or given out twice')
  }

  #room (): number {
    return this.pool.free + this.#cachedBlocks
  }

  #wait<T> (blocks: number, take: () => T, options: WaitOptions): Promise<T> {
    if (blocks > this.pool.total) {
      return Promise.reject(new CacheError('TOO_LARGE', `${blocks} feature blocks are needed, the pool has ${this.pool.total}`))
    }
    const waiting = this.#queue.wait(blocks, take, options)
    if (this.#queue.length > 0) this.onShortage?.()
    return waiting
  }

  #take (hash: string, blocks: number, meta: FeatureMeta): FeatureEntry {
    if (this.#index.has(hash)) throw new Error(`features ${hash}: reserved twice`)
    for (const idle of this.#idle) {
      if (this.pool.free >= blocks) break
      this.#evict(idle)
    }
    const entry: Entry = { hash, numTokens: meta.numTokens, grid: meta.grid, refs: 0, state: 'pending', filling: true, blocks: this.pool.allocate(blocks) as number[] }
    this.#entries.add(entry)
    this.#index.set(hash, entry)
    return entry
  }

  #evict (idle: Entry): void {
    this.#idle.delete(idle)
    this.#index.delete(idle.hash)
    this.#entries.delete(idle)
    this.#cachedBlocks -= idle.blocks.length
    idle.state = 'dead'
    this.pool.release(idle.blocks)
  }

  #filled (entry: FeatureEntry): Entry {
    const own = entry as Entry
    if (!own.filling) throw new Error(`features ${own.hash}: filled twice (commit and abandon come once)`)
    own.filling = false
    return own
  }

  #bury (entry: Entry): void {
    if (this.#index.get(entry.hash) === entry) this.#index.delete(entry.hash)
    if (this.#idle.delete(entry)) this.#cachedBlocks -= entry.blocks.length
    entry.state = 'dead'
    this.#settle(entry)
  }

  /** Frees or shelves an entry that is neither written nor held any more. */
  #settle (entry: Entry): void {
    if (entry.refs > 0 || entry.filling) return
    if (entry.state === 'dead') {
      this.pool.release(entry.blocks)
      this.#entries.delete(entry)
    } else {
      this.#idle.add(entry)
      this.#cachedBlocks += entry.blocks.length
    }
    this.#queue.serve()
  }
}
