/** What a chart shows of a slot: when it began, in ms of Unix time; how many went well, and failed; the median and the 95th percentile, in ms, of those that went well. */
export type Slot = readonly [at: number, calls: number, failed: number, p50: number | null, p95: number | null]

export interface Sum { readonly calls: number, readonly failed: number, readonly p50: number | null, readonly p95: number | null }

/** The time ranges of a chart, and into how many slots of how many ms each is cut. */
export const RANGES = { '5m': { step: 5_000, slots: 60 }, '1h': { step: 60_000, slots: 60 } } as const
export type Range = keyof typeof RANGES

const LOWEST_MS = 0.01
/** Two neighbouring bounds differ by a fifth: a quantile is off by a tenth at most. */
const PER_DECADE = 12
const BUCKETS = 8 * PER_DECADE

/**
 * How long the calls of one stage took, over time: a histogram for each slot of each range, 46 KiB in all, whatever the
 * rate. A slot is used again when its time comes round.
 */
export class Histograms {
  readonly #rings = Object.values(RANGES).map(({ step, slots }) => new Ring(step, slots))

  /** @param at when it ended, in ms of Unix time */
  note (at: number, ms: number, failed: boolean): void {
    const bucket = failed ? -1 : Math.min(BUCKETS - 1, Math.max(0, Math.floor(Math.log10(ms / LOWEST_MS) * PER_DECADE)))
    for (const ring of this.#rings) ring.note(at, Number.isNaN(bucket) ? 0 : bucket)
  }

  /** Slots with calls, oldest first. */
  chart (range: Range, now: number): Slot[] {
    return this.#ring(range).slots(now)
  }

  /** All of the range together. */
  sum (range: Range, now: number): Sum {
    return this.#ring(range).sum(now)
  }

  #ring (range: Range): Ring {
    return this.#rings[Object.keys(RANGES).indexOf(range)]!
  }
}

class Ring {
  readonly #step: number
  readonly #slots: number
  /** Which slot of time each place holds; 0: none yet. */
  readonly #stamps: Float64Array
  readonly #failed: Uint32Array
  readonly #counts: Uint32Array

  constructor (step: number, slots: number) {
    this.#step = step
    this.#slots = slots
    this.#stamps = new Float64Array(slots)
    this.#failed = new Uint32Array(slots)
    this.#counts = new Uint32Array(slots * BUCKETS)
  }

  /** @param bucket -1 for one that failed */
  note (at: number, bucket: number): void {
    const stamp = Math.floor(at / this.#step)
    const place = stamp % this.#slots
    const held = this.#stamps[place]!
    // What is older than the range has lost its place to what came later.
    if (!(stamp >= held) || stamp < 0) return
    if (stamp > held) {
      this.#stamps[place] = stamp
      this.#failed[place] = 0
      this.#counts.fill(0, place * BUCKETS, (place + 1) * BUCKETS)
    }
    if (bucket < 0) this.#failed[place]!++
    else this.#counts[place * BUCKETS + bucket]!++
  }

  slots (now: number): Slot[] {
    return this.#places(now).map(place => {
      const { calls, failed, p50, p95 } = summed([this.#of(place)], this.#failed[place]!)
      return [this.#stamps[place]! * this.#step, calls, failed, p50, p95]
    })
  }

  sum (now: number): Sum {
    const places = this.#places(now)
    return summed(places.map(place => this.#of(place)), places.reduce((sum, place) => sum + this.#failed[place]!, 0))
  }

  #of (place: number): Uint32Array {
    return this.#counts.subarray(place * BUCKETS, (place + 1) * BUCKETS)
  }

  /** Those within the range, oldest first. */
  #places (now: number): number[] {
    const last = Math.floor(now / this.#step)
    return Array.from({ length: this.#slots }, (_, i) => last - this.#slots + 1 + i)
      .filter(stamp => stamp > 0 && this.#stamps[stamp % this.#slots] === stamp).map(stamp => stamp % this.#slots)
  }
}

function summed (histograms: readonly Uint32Array[], failed: number): Sum {
  const total = new Float64Array(BUCKETS)
  for (const counts of histograms) for (let i = 0; i < BUCKETS; i++) total[i]! += counts[i]!
  const calls = total.reduce((sum, count) => sum + count, 0)
  return { calls, failed, p50: quantile(total, calls, 0.5), p95: quantile(total, calls, 0.95) }
}

/** The middle of its bucket. */
function quantile (counts: Float64Array, calls: number, q: number): number | null {
  if (calls === 0) return null
  let seen = 0
  const bucket = counts.findIndex(count => (seen += count) >= q * calls)
  return Number((LOWEST_MS * 10 ** ((bucket + 0.5) / PER_DECADE)).toPrecision(3))
}
