/** Gathers prepared items into batches for the one session worker there is. Bookkeeping and timers; no tensors. */
export interface BatchLimits {
  /** Items in one run. */
  readonly maxItems: number
  /** Units of work (tiles) in one run; an item with more runs alone. */
  readonly maxUnits: number
  /** Longest wait for items that are about to be ready, milliseconds. */
  readonly maxWindowMs: number
}

export interface Batchable {
  readonly units: number
  /** Items with different keys never share a run: their inputs do not join. */
  readonly key: string
  /** Never shares a run with any other. */
  readonly alone?: boolean | undefined
}

/** Share of a run's usual time worth waiting for company. */
const WINDOW_SHARE = 0.1

/**
 * Runs batches one at a time. An item that comes while nothing runs and nothing else is expected starts at once; while
 * a run is on, items gather by themselves; after it, when more are known to be on their way, a window of a tenth of a
 * run's usual time lets them join.
 */
export class Batcher<T extends Batchable> {
  readonly #limits: BatchLimits
  readonly #run: (batch: readonly T[]) => Promise<void>
  /** How many items are being prepared right now. */
  readonly #expected: () => number
  readonly #queue = new Set<T>()
  #running = false
  #timer: NodeJS.Timeout | undefined
  /** Moving average of a run, milliseconds. */
  #meanRunMs = 0

  constructor (limits: BatchLimits, expected: () => number, run: (batch: readonly T[]) => Promise<void>) {
    this.#limits = limits
    this.#expected = expected
    this.#run = run
  }

  get queued (): number {
    return this.#queue.size
  }

  get running (): boolean {
    return this.#running
  }

  add (item: T): void {
    this.#queue.add(item)
    this.#consider()
  }

  /** Drops an item that still waits; false when it is in a run, or done. */
  drop (item: T): boolean {
    return this.#queue.delete(item)
  }

  #consider (): void {
    if (this.#running || this.#queue.size === 0) return
    const windowMs = Math.min(this.#limits.maxWindowMs, this.#meanRunMs * WINDOW_SHARE)
    const batch = this.#next()
    const full = batch.length < this.#queue.size || batch.length >= this.#limits.maxItems || batch[0]?.alone === true
    if (full || windowMs <= 0 || this.#expected() === 0) return this.#start()
    this.#timer ??= setTimeout(() => this.#start(), windowMs)
  }

  /** The longest batch from the head of the queue that the limits allow. */
  #next (): T[] {
    const batch: T[] = []
    let units = 0
    for (const item of this.#queue) {
      const [first] = batch
      if (first !== undefined && (first.alone === true || item.alone === true || batch.length >= this.#limits.maxItems || units + item.units > this.#limits.maxUnits || item.key !== first.key)) break
      batch.push(item)
      units += item.units
    }
    return batch
  }

  #start (): void {
    clearTimeout(this.#timer)
    this.#timer = undefined
    const batch = this.#next()
    if (batch.length === 0) return
    for (const item of batch) this.#queue.delete(item)
    this.#running = true
    const begin = performance.now()
    // `run` rejects each item itself.
    this.#run(batch).catch(() => {}).finally(() => {
      const ms = performance.now() - begin
      this.#meanRunMs = this.#meanRunMs === 0 ? ms : this.#meanRunMs * 0.8 + ms * 0.2
      this.#running = false
      this.#consider()
    })
  }
}
