import type { WaitOptions } from '../../cache/room-queue.ts'
import type { BlockManager } from '../blocks/block-manager.ts'
import { extendHashes } from '../blocks/prefix-hash.ts'
import { SequenceBlocks } from '../blocks/sequence-blocks.ts'
import type { PrefillChunk, Sequence } from '../sequence/sequence.ts'
import { admit, evict, joinAfterMigration } from '../sequence/states.ts'
import { prefillChunks, type Batch, type BatchScheduler, type KvStats } from './batch-scheduler.ts'
import { Reservations } from './reservations.ts'

export interface SchedulerOptions {
  readonly blockTokens: number
  /** Most sequences that are RUNNING. */
  readonly maxBatchSize: number
  /** Most prompt tokens of one prefill step: what a decode step may have to wait for. */
  readonly maxPrefillTokens: number
}

/** `deferred`: the sequence waits, but not for room, so younger ones may go first. */
type Admission = 'served' | 'deferred' | 'no room'

/**
 * Decides what the next forward pass computes. First come, first served; prefill and decode steps alternate while there
 * is work for both, so that neither starves. When decoding needs a block and none is left, the newest sequence is evicted.
 *
 * Sequences whose keys and values migrate wait in the same order of arrival: for blocks before the pull, for a place in the
 * batch after it.
 */
export class Scheduler implements BatchScheduler {
  readonly blocks: BlockManager
  readonly #options: SchedulerOptions
  readonly #held: SequenceBlocks
  /** In order of arrival, as #running. */
  readonly #waiting: Sequence[] = []
  readonly #running: Sequence[] = []
  readonly #reservations = new Reservations()
  /** Migrating sequences that have their blocks: being pulled, or MIGRATION_DONE. */
  readonly #arriving = new Set<Sequence>()
  #lastWasPrefill = false
  /** Evictions since the start. */
  evictions = 0

  constructor (blocks: BlockManager, options: SchedulerOptions) {
    this.blocks = blocks
    this.#options = options
    this.#held = new SequenceBlocks(blocks, options.blockTokens)
  }

  get waiting (): readonly Sequence[] {
    return this.#waiting
  }

  get running (): readonly Sequence[] {
    return this.#running
  }

  get stats (): KvStats {
    return { ...this.blocks.stats, spilled: this.#waiting.reduce((sum, s) => sum + (s.spilled?.length ?? 0), 0) }
  }

  get size (): number {
    return this.#waiting.length + this.#running.length + this.#reservations.size + this.#arriving.size
  }

  get maxTokens (): number {
    return this.blocks.pool.total * this.#options.blockTokens
  }

  /** Takes a sequence that is WAITING, or MIGRATION_DONE after `reserve`. One that was evicted gets its old place in the queue. */
  add (sequence: Sequence): void {
    if (sequence.state === 'MIGRATION_DONE') this.#held.computed(sequence, sequence.promptLength)
    else insert(this.#waiting, sequence)
  }

  /**
   * KV blocks for the prompt of a migrating sequence, in order of arrival and when there is room. Resolves with how many
   * leading ones are cached; the caller fills the others. `remove` frees them.
   * Rejects with CacheError BUSY after `timeoutMs`, or with the signal's reason.
   */
  async reserve (sequence: Sequence, options: WaitOptions): Promise<number> {
    options.signal?.throwIfAborted()
    const first = this.#waiting.length === 0 && this.#reservations.size === 0
    if (first && this.#tryReserve(sequence)) return sequence.committed
    return await this.#reservations.wait(sequence, options)
  }

  remove (sequence: Sequence): void {
    for (const queue of [this.#waiting, this.#running]) {
      const at = queue.indexOf(sequence)
      if (at >= 0) queue.splice(at, 1)
    }
    this.#arriving.delete(sequence)
    this.#held.end(sequence)
  }

  schedule (): Batch | undefined {
    // A decode step that evicted everything it could decode leaves room: for the oldest again, or for the prefill whose turn it was not.
    return this.#next() ?? (this.#waiting.length > 0 ? this.#next() : undefined)
  }

  #next (): Batch | undefined {
    const decoding = this.#running.some(s => s.decodes)
    const joined = this.#admit()
    if (joined.length > 0) return { kind: 'join', sequences: joined }
    const chunks = decoding && this.#lastWasPrefill ? [] : prefillChunks(this.#running, this.#options.maxPrefillTokens)
    this.#lastWasPrefill = chunks.length > 0
    if (chunks.length > 0) return { kind: 'prefill', chunks }
    const sequences = this.#decodable()
    return sequences.length > 0 ? { kind: 'decode', sequences } : undefined
  }

  prefilled ({ sequence, start, count }: PrefillChunk): void {
    this.#held.computed(sequence, start + count)
  }

  decoded (sequence: Sequence, token: number): void {
    sequence.tokens.push(token)
    this.#held.computed(sequence, sequence.computed + 1)
  }

  /** Gives places and blocks to waiting sequences, oldest first. Returns the migrated ones that enter the batch. */
  #admit (): Sequence[] {
    const inWork = this.#hashesInWork()
    const joined: Sequence[] = []
    let room = true
    for (const sequence of this.#inOrderOfArrival()) {
      if (sequence.state === 'MIGRATION_DONE') {
        if (this.#tryJoin(sequence)) joined.push(sequence)
      } else if (room) {
        // Once one lacks room the younger ones wait too, or a long prompt might never get in. A migrated one has its blocks already.
        room = this.#serve(sequence, inWork) !== 'no room'
      }
    }
    return joined
  }

  #inOrderOfArrival (): Sequence[] {
    const arrived = [...this.#arriving].filter(s => s.state === 'MIGRATION_DONE')
    if (arrived.length === 0 && this.#reservations.size === 0) return [...this.#waiting]
    return [...this.#waiting, ...this.#reservations.sequences, ...arrived].sort((a, b) => a.id - b.id)
  }

  #serve (sequence: Sequence, inWork: Set<string>): Admission {
    if (!this.#reservations.has(sequence)) return this.#tryAdmit(sequence, inWork)
    if (!this.#tryReserve(sequence)) return 'no room'
    this.#reservations.grant(sequence, sequence.committed)
    return 'served'
  }

  /** The prefill engine's token counts as if it had been sampled here. */
  #tryJoin (sequence: Sequence): boolean {
    if (this.#running.length >= this.#options.maxBatchSize) return false
    this.#arriving.delete(sequence)
    joinAfterMigration(sequence)
    sequence.tokens.push(sequence.first?.token as number)
    sequence.times.admitted = performance.now()
    insert(this.#running, sequence)
    return true
  }

  #tryReserve (sequence: Sequence): boolean {
    // Nothing of the prompt is left to compute, so every full block may come from the cache.
    extendHashes(sequence, this.#options.blockTokens, sequence.length)
    if (!this.#held.take(sequence, sequence.hashes, this.#spare)) return false
    this.#arriving.add(sequence)
    return true
  }

  /** Blocks to leave free: each running sequence may soon need one, and a newcomer in the last ones would be evicted at once. */
  get #spare (): number {
    return this.#running.length + this.#arriving.size
  }

  #tryAdmit (sequence: Sequence, inWork: Set<string>): Admission {
    const { blockTokens, maxBatchSize } = this.#options
    if (this.#running.length >= maxBatchSize) return 'deferred'
    // The last token is left to decode, so a block that it fills can't come from the cache. Without output one more is left: it ends with its prefill.
    const lookFor = Math.floor((sequence.length - (sequence.maxTokens > 0 ? 1 : 2)) / blockTokens)
    extendHashes(sequence, blockTokens, lookFor * blockTokens)
    const wanted = sequence.hashes.slice(0, lookFor)
    const next = wanted[this.blocks.match(wanted).blocks]
    // Another sequence is computing the same prefix: its blocks will be cached in a step or two.
    if (sequence.spilled === undefined && next !== undefined && inWork.has(next)) return 'deferred'
    if (!this.#held.take(sequence, wanted, this.#spare)) return 'no room'
    this.#held.begin(sequence)
    sequence.cachedTokens ??= sequence.computed - sequence.ahead
    sequence.times.admitted ??= performance.now()
    for (const hash of wanted.slice(sequence.committed)) inWork.add(hash)
    admit(sequence)
    this.#waiting.splice(this.#waiting.indexOf(sequence), 1)
    insert(this.#running, sequence)
    return 'served'
  }

  #hashesInWork (): Set<string> {
    const hashes = new Set<string>()
    for (const sequence of this.#running) {
      if (sequence.prefillLeft === 0) continue
      for (let i = sequence.committed; i < sequence.hashes.length; i++) hashes.add(sequence.hashes[i] as string)
    }
    return hashes
  }

  /** Sequences for a decode step, each with a block for the token it is about to write. */
  #decodable (): Sequence[] {
    for (const sequence of [...this.#running]) {
      if (!sequence.decodes) continue
      while (sequence.state === 'RUNNING' && !this.#held.grow(sequence)) this.#evict(this.#running[this.#running.length - 1] as Sequence)
    }
    return this.#running.filter(s => s.decodes)
  }

  #evict (sequence: Sequence): void {
    evict(sequence)
    this.#running.splice(this.#running.indexOf(sequence), 1)
    this.#held.evict(sequence)
    sequence.evictions++
    this.evictions++
    this.add(sequence)
  }

  clear (): void {
    this.blocks.clear()
  }

  checkIntegrity (): void {
    this.#held.checkIntegrity([...this.#running, ...this.#arriving])
    for (const s of this.#waiting) if (s.state !== 'WAITING' || s.blocks.length > 0) throw new Error(`sequence ${s.id} waits as ${s.state} with ${s.blocks.length} blocks`)
    for (const s of this.#running) if (s.state !== 'RUNNING' && s.state !== 'LOCKED') throw new Error(`sequence ${s.id} runs as ${s.state}`)
    const all = [...this.#waiting, ...this.#running, ...this.#arriving, ...this.#reservations.sequences]
    if (new Set(all).size !== all.length) throw new Error('a sequence is in two queues')
  }
}

/** Ids are given out in order of arrival. */
function insert (queue: Sequence[], sequence: Sequence): void {
  let at = queue.length
  while (at > 0 && (queue[at - 1] as Sequence).id > sequence.id) at--
  queue.splice(at, 0, sequence)
}
