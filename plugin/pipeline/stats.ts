import type { Topology } from '../planning/index.ts'

const MAX_LINKS = 1_024

export type RequestOutcome = 'ok' | 'error' | 'refused' | 'aborted'

/** Counts for /metrics. Plain numbers: a request adds to a few of them, and they are read at collection only. */
export class Stats {
  /** Plans tried after the first. */
  retries = 0
  /** Encode calls that failed and moved to another encoder. */
  encodeMoves = 0
  /** Requests whose language model encoded because every encoder had failed. */
  encodeFallbacks = 0
  readonly #requests = new Map<string, Partial<Record<RequestOutcome, number>>>()
  readonly #encoders = new Map<string, { node: string, items: number, cached: number }>()
  readonly #links = new Map<string, { from: string, to: string, bytes: number }>()

  count (plan: Topology | 'none', outcome: RequestOutcome): void {
    let counts = this.#requests.get(plan)
    if (counts === undefined) this.#requests.set(plan, counts = {})
    counts[outcome] = (counts[outcome] ?? 0) + 1
  }

  /** An encoder has answered for so many items, of which it had some already. */
  encoded (node: string, items: number, cached: number): void {
    const counts = this.#encoders.get(node)
    if (counts === undefined) this.#encoders.set(node, { node, items, cached })
    else {
      counts.items += items
      counts.cached += cached
    }
  }

  /** `to` has pulled blocks from `from`. */
  moved (from: string, to: string, bytes: number): void {
    const key = `${from} ${to}`
    const link = this.#links.get(key)
    if (link !== undefined) link.bytes += bytes
    // Both ends are what a node says: a bound, as one that lies must not fill the memory.
    else if (this.#links.size < MAX_LINKS) this.#links.set(key, { from, to, bytes })
  }

  encoders (): ReadonlyArray<{ readonly node: string, readonly items: number, readonly cached: number }> {
    return [...this.#encoders.values()]
  }

  links (): ReadonlyArray<{ readonly from: string, readonly to: string, readonly bytes: number }> {
    return [...this.#links.values()]
  }

  requests (): Array<{ readonly plan: string, readonly outcome: string, readonly count: number }> {
    return [...this.#requests].flatMap(([plan, counts]) =>
      Object.entries(counts).map(([outcome, count]) => ({ plan, outcome, count })))
  }
}
