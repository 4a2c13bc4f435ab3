import { prefillChunks, type Batch, type BatchScheduler } from '../llm/scheduler/batch-scheduler.ts'
import type { BlockStats } from '../llm/blocks/block-manager.ts'
import type { Sequence, PrefillChunk } from '../llm/sequence/sequence.ts'
import { admit } from '../llm/sequence/states.ts'
import type { SlotTable } from './slot-table.ts'

export interface SlotSchedulerOptions {
  /** Tokens a slot has room for. */
  readonly sessionLen: number
  /** Most sequences that are RUNNING; further slots keep idle sessions only. */
  readonly maxBatchSize: number
  /** LMDeploy's `max_prefill_token_num`: most prompt tokens of one step, so that a long prompt does not hold up those that decode. */
  readonly maxPrefillTokens: number
}

/**
 * The persistent batch: sequences join it in order of arrival when there is a slot, and leave it between any two steps.
 * A slot has room for the whole session, so no running sequence is ever evicted. Prefill and decode steps alternate while
 * there is work for both.
 */
export class SlotScheduler implements BatchScheduler {
  readonly slots: SlotTable
  readonly #options: SlotSchedulerOptions
  /** Both in order of arrival. */
  readonly #waiting: Sequence[] = []
  readonly #running: Sequence[] = []
  #lastWasPrefill = false

  constructor (slots: SlotTable, options: SlotSchedulerOptions) {
    this.slots = slots
    this.#options = options
  }

  get waiting (): readonly Sequence[] {
    return this.#waiting
  }

  get running (): readonly Sequence[] {
    return this.#running
  }

  get maxTokens (): number {
    return this.#options.sessionLen
  }

  get evictions (): number {
    return this.slots.evictions
  }

  get stats (): BlockStats {
    return this.slots.stats
  }

  get size (): number {
    return this.#waiting.length + this.#running.length
  }

  add (sequence: Sequence): void {
    // Ids count up in order of arrival; a sequence that had to wait for its features still gets its place in it.
    const after = this.#waiting.findIndex(other => other.id > sequence.id)
    this.#waiting.splice(after < 0 ? this.#waiting.length : after, 0, sequence)
  }

  remove (sequence: Sequence): void {
    for (const queue of [this.#waiting, this.#running]) {
      const at = queue.indexOf(sequence)
      if (at >= 0) queue.splice(at, 1)
    }
    const [slot] = sequence.blocks
    if (slot !== undefined) this.slots.giveBack(slot, sequence)
    sequence.blocks = []
    sequence.computed = 0
  }

  schedule (): Batch | undefined {
    this.#join()
    const decoding = this.#running.filter(sequence => sequence.decodes)
    if (!(decoding.length > 0 && this.#lastWasPrefill)) {
      const chunks = prefillChunks(this.#running, this.#options.maxPrefillTokens)
      if (chunks.length > 0) {
        this.#lastWasPrefill = true
        return { kind: 'prefill', chunks }
      }
    }
    this.#lastWasPrefill = false
    return decoding.length > 0 ? { kind: 'decode', sequences: decoding } : undefined
  }

  #join (): void {
    while (this.#running.length < this.#options.maxBatchSize && this.slots.hasRoom) {
      const sequence = this.#waiting.shift()
      if (sequence === undefined) return
      const place = this.slots.take(sequence)
      if (place === undefined) throw new Error('the slot table has room but no slot')
      sequence.blocks = [place.slot]
      sequence.computed = sequence.cachedTokens = place.reused
      sequence.times.admitted = performance.now()
      admit(sequence)
      this.#running.push(sequence)
    }
  }

  prefilled ({ sequence, start, count }: PrefillChunk): void {
    sequence.computed = start + count
  }

  decoded (sequence: Sequence, token: number): void {
    sequence.computed++
    sequence.tokens.push(token)
  }

  clear (): void {
    this.slots.clear()
  }

  checkIntegrity (): void {
    this.slots.checkIntegrity(this.#running.flatMap(sequence => sequence.blocks))
    for (const { id, state, blocks } of this.#waiting) if (state !== 'WAITING' || blocks.length > 0) throw new Error(`sequence ${id} waits as ${state} with a slot`)
    for (const { id, state, blocks } of this.#running) {
      if (blocks.length !== 1 || (state !== 'RUNNING' && state !== 'LOCKED')) throw new Error(`sequence ${id} runs as ${state} with ${blocks.length} slots`)
    }
  }
}
