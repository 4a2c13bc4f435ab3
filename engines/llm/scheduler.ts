import type { BatchScheduler, Plan } from './batch-scheduler.ts'
import type { BlockManager, BlockStats } from './block-manager.ts'
import { prefillChunks, type PrefillChunk } from './prefill-chunks.ts'
import { extendHashes } from './prefix-hash.ts'
import type { Sequence } from './sequence.ts'
import { admit, evict } from './sequence-states.ts'

export interface SchedulerOptions {
  readonly blockTokens: number
  /** Most sequences that are RUNNING. */
  readonly maxBatchSize: number
  /** Most prompt tokens of one prefill step: what a decode step may have to wait for. */
  readonly maxPrefillTokens: number
  /** Called for each evicted sequence, WAITING again. */
  readonly onEvict?: (sequence: Sequence) => void
}

/**
 * Decides what the next forward pass computes. First come, first served; prefill and decode steps alternate while there
 * is work for both, so that neither starves. When decoding needs a block and none is left, the newest sequence is evicted.
 */
export class Scheduler implements BatchScheduler {
  readonly blocks: BlockManager
  readonly #options: SchedulerOptions
  /** Both in order of arrival. */
  readonly #waiting: Sequence[] = []
  readonly #running: Sequence[] = []
  #lastWasPrefill = false
  /** Evictions since the start. */
  evictions = 0

  constructor (blocks: BlockManager, options: SchedulerOptions) {
    this.blocks = blocks
    this.#options = options
  }

  get waiting (): readonly Sequence[] {
    return this.#waiting
  }

  get running (): readonly Sequence[] {
    return this.#running
  }

  get stats (): BlockStats {
    return this.blocks.stats
  }

  /** The longest sequence (prompt and output) that could ever run. */
  get maxTokens (): number {
    return this.blocks.pool.total * this.#options.blockTokens
  }

  /** Takes a WAITING sequence. */
  add (sequence: Sequence): void {
    // Ids are given out in order of arrival, so an evicted sequence or one that migrated goes back to its place.
    let at = this.#waiting.length
    while (at > 0 && (this.#waiting[at - 1] as Sequence).id > sequence.id) at--
    this.#waiting.splice(at, 0, sequence)
  }

  /** Forgets a sequence that has left WAITING or RUNNING for good, and frees its blocks. */
  remove (sequence: Sequence): void {
    for (const queue of [this.#waiting, this.#running]) {
      const at = queue.indexOf(sequence)
      if (at >= 0) queue.splice(at, 1)
    }
    this.#free(sequence)
  }

  /** The next forward pass; undefined when there is nothing to do. */
  schedule (): Plan | undefined {
    const decoding = this.#running.some(s => s.prefillLeft === 0)
    if (!(decoding && this.#lastWasPrefill)) {
      this.#admit()
      const chunks = prefillChunks(this.#running, this.#options.maxPrefillTokens)
      if (chunks.length > 0) {
        this.#lastWasPrefill = true
        return { kind: 'prefill', chunks }
      }
    }
    this.#lastWasPrefill = false
    const sequences = this.#decodable()
    // Everything that could decode may have been evicted for lack of blocks; then there is room for the oldest again.
    if (sequences.length === 0) return this.#waiting.length > 0 && this.#running.length === 0 ? this.#retry() : undefined
    return { kind: 'decode', sequences }
  }

  #retry (): Plan | undefined {
    this.#admit()
    const chunks = prefillChunks(this.#running, this.#options.maxPrefillTokens)
    if (chunks.length > 0) return { kind: 'prefill', chunks }
    const sequences = this.#decodable()
    return sequences.length > 0 ? { kind: 'decode', sequences } : undefined
  }

  /** A chunk has been computed and written. */
  prefilled ({ sequence, start, count }: PrefillChunk): void {
    sequence.computed = start + count
    this.#commit(sequence)
  }

  /** A decode step computed the last token and sampled the next. */
  decoded (sequence: Sequence, token: number): void {
    sequence.computed++
    sequence.tokens.push(token)
    this.#commit(sequence)
  }

  #commit (sequence: Sequence): void {
    const { blockTokens } = this.#options
    const full = Math.floor(sequence.computed / blockTokens)
    if (full <= sequence.committed) return
    extendHashes(sequence, blockTokens, full * blockTokens)
    for (let i = sequence.committed; i < full; i++) this.blocks.commit(sequence.blocks[i] as number, sequence.hashes[i] as string)
    sequence.committed = full
  }

  /** Moves waiting sequences to RUNNING, oldest first, as long as there is room for the whole of each. */
  #admit (): void {
    const { maxBatchSize } = this.#options
    const inWork = this.#hashesInWork()
    for (const sequence of [...this.#waiting]) {
      if (this.#running.length >= maxBatchSize) return
      const verdict = this.#tryAdmit(sequence, inWork)
      // No overtaking for lack of room, or a long prompt might never get in.
      if (verdict === 'no room') return
    }
  }

  #tryAdmit (sequence: Sequence, inWork: Set<string>): 'admitted' | 'deferred' | 'no room' {
    const { blockTokens } = this.#options
    // The last token is left to decode, so a block that it fills is not looked for.
    const lookFor = Math.floor((sequence.length - 1) / blockTokens)
    extendHashes(sequence, blockTokens, lookFor * blockTokens)
    const wanted = sequence.hashes.slice(0, lookFor)
    const found = this.blocks.match(wanted)
    const next = wanted[found.blocks]
    // Another sequence computes the same prefix right now: its blocks will be there in a step or two.
    if (next !== undefined && inWork.has(next)) return 'deferred'
    const missing = Math.ceil(sequence.length / blockTokens) - found.blocks
    // Each running sequence may soon need a block; admitting into the last ones would evict the newcomer at once.
    const spare = this.#running.length
    if (missing + spare > this.blocks.available - found.idle) return 'no room'
    sequence.blocks = wanted.slice(0, found.blocks).map(hash => this.blocks.acquire(hash))
    sequence.blocks.push(...this.blocks.allocate(missing) as number[])
    sequence.committed = found.blocks
    sequence.computed = found.blocks * blockTokens
    sequence.cachedTokens ??= sequence.computed
    sequence.times.admitted ??= performance.now()
    for (const hash of wanted.slice(found.blocks)) inWork.add(hash)
    admit(sequence)
    this.#waiting.splice(this.#waiting.indexOf(sequence), 1)
    this.#insertRunning(sequence)
    return 'admitted'
  }

  #hashesInWork (): Set<string> {
    const hashes = new Set<string>()
    for (const sequence of this.#running) {
      if (sequence.prefillLeft === 0) continue
      for (let i = sequence.committed; i < sequence.hashes.length; i++) hashes.add(sequence.hashes[i] as string)
    }
    return hashes
  }

  #insertRunning (sequence: Sequence): void {
    let at = this.#running.length
    while (at > 0 && (this.#running[at - 1] as Sequence).id > sequence.id) at--
    this.#running.splice(at, 0, sequence)
  }

  /** Sequences for a decode step, each with a block for the token it is about to write. */
  #decodable (): Sequence[] {
    for (const sequence of [...this.#running]) {
      if (sequence.prefillLeft > 0 || sequence.state !== 'RUNNING') continue
      const needed = Math.floor(sequence.computed / this.#options.blockTokens) + 1
      while (sequence.blocks.length < needed && sequence.state === 'RUNNING') {
        const block = this.blocks.allocate(1)
        if (block !== undefined) sequence.blocks.push(...block)
        else this.#evict(this.#running[this.#running.length - 1] as Sequence)
      }
    }
    return this.#running.filter(s => s.prefillLeft === 0)
  }

  #evict (sequence: Sequence): void {
    evict(sequence)
    this.#running.splice(this.#running.indexOf(sequence), 1)
    this.#free(sequence)
    sequence.evictions++
    this.evictions++
    this.add(sequence)
    this.#options.onEvict?.(sequence)
  }

  #free (sequence: Sequence): void {
    this.blocks.release(sequence.blocks)
    sequence.blocks = []
    sequence.computed = 0
    sequence.committed = 0
  }

  clear (): void {
    this.blocks.clear()
  }

  checkIntegrity (): void {
    this.blocks.checkIntegrity([...this.#running].map(s => s.blocks))
    for (const s of this.#waiting) if (s.state !== 'WAITING' || s.blocks.length > 0) throw new Error(`sequence ${s.id} waits as ${s.state} with ${s.blocks.length} blocks`)
    for (const s of this.#running) if (s.state !== 'RUNNING' && s.state !== 'LOCKED') throw new Error(`sequence ${s.id} runs as ${s.state}`)
    const all = [...this.#waiting, ...this.#running]
    if (new Set(all).size !== all.length) throw new Error('a sequence is in two queues')
  }
}
