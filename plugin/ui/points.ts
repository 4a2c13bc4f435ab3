import type { StoredSpan } from '../traces/span.ts'

/** [when it ended, in ms of Unix time; how long it took, in ms; 1 when it failed] */
export type Point = readonly [at: number, ms: number, failed: 0 | 1]

const WINDOW_MS = 120_000
/** Points in a row that are all kept, and how many a second from there on: a chart shows no more, and a feed should not carry more. */
const BURST = 40
const PER_SECOND = 2
const MAX_POINTS = 2 * (BURST + PER_SECOND * WINDOW_MS / 1_000)

/** The calls of one stage in the last two minutes: all of them, or at a higher rate an even sample of those that went well and of those that failed. */
export class Points {
  #points: Point[] = []
  /** How many more may come at once: of those that went well, of those that failed. */
  readonly #spare = [BURST, BURST]
  #at = -Infinity
  #now = 0

  /** Would a point be made of it? */
  takes ({ endTime, status }: StoredSpan): boolean {
    const at = this.#endedAt(endTime)
    if (at > this.#at) this.#refill(at)
    return this.#spare[failed(status)]! >= 1
  }

  note (span: StoredSpan): void {
    if (!this.takes(span)) return
    const { startTime, endTime } = span
    const kind = failed(span.status)
    this.#spare[kind]!--
    const ms = (endTime[0] - startTime[0]) * 1e3 + (endTime[1] - startTime[1]) / 1e6
    this.#points.push([Math.round(this.#endedAt(endTime)), Math.round(ms * 100) / 100, kind])
    if (this.#points.length > 2 * MAX_POINTS) this.#points = this.#points.slice(-MAX_POINTS)
  }

  /** By time, as spans do not come in order. */
  since (now: number): Point[] {
    this.#points = this.#points.filter(([at]) => at > now - WINDOW_MS)
    return this.#points.sort((one, other) => one[0] - other[0]).slice(-MAX_POINTS)
  }

  /** Now at the latest: an engine's clock may be ahead, and what is yet to come would neither leave the chart nor let others in. */
  #endedAt ([seconds, nanoseconds]: StoredSpan['endTime']): number {
    const at = seconds * 1e3 + nanoseconds / 1e6
    // Looked up once a millisecond, whatever the rate.
    if (at > this.#now) this.#now = Date.now() + 1
    return Math.min(at, this.#now)
  }

  #refill (at: number): void {
    for (const kind of [0, 1]) this.#spare[kind] = Math.min(BURST, this.#spare[kind]! + (at - this.#at) / 1_000 * PER_SECOND)
    this.#at = at
  }
}

function failed (status: StoredSpan['status']): 0 | 1 {
  return status === 'error' ? 1 : 0
}
