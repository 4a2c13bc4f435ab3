import { ATTR, SPAN } from '../../adapters/wire/semconv.ts'
import { Counter } from '../../adapters/wire/series.ts'
import type { StoredSpan } from '../traces/span.ts'

const MAX_LINKS = 1_024

export type RequestOutcome = 'ok' | 'error' | 'refused' | 'aborted'

/** Counts for /metrics. A request adds to a few of them, and they are read at collection only. */
export class Stats {
  /** By topology and outcome. */
  readonly served = new Counter(ATTR.topology, ATTR.outcome)
  /** Plans tried after the first, by what had failed. */
  readonly retried = new Counter(ATTR.errorType)
  /** Bytes of requests and answers, by topology. */
  readonly requestBytes = new Counter(ATTR.topology)
  readonly answerBytes = new Counter(ATTR.topology)
  /** Media items that no encoder had to encode, by reason. */
  readonly skipped = new Counter(ATTR.reason)
  /** By name of the key, and outcome. */
  readonly keyRequests = new Counter(ATTR.key, ATTR.outcome)
  /** By name of the key, type of the tokens, and model. */
  readonly keyTokens = new Counter(ATTR.key, ATTR.tokenType, ATTR.requestModel)
  /** Encode calls that failed and moved to another encoder. */
  encodeMoves = 0
  /** Requests whose language model encoded because every encoder had failed. */
  encodeFallbacks = 0
  readonly #encoders = new Map<string, { node: string, items: number, cached: number }>()
  readonly #links = new Map<string, { from: string, to: string, bytes: number }>()

  /** An encoder has answered for so many items, of which it had some already. */
  encoded (node: string, items: number, cached: number): void {
    if (cached > 0) this.skipped.add(cached, 'cached')
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

  /** Counts the bytes moved over each link, which only the engines' spans say. */
  noteSpan (span: StoredSpan): void {
    const { name, instance } = span
    if (name !== SPAN.engineMigrate && name !== SPAN.engineAhead) return
    const { [ATTR.peer]: peers, [ATTR.peerBytes]: bytes } = span.attributes
    if (typeof peers !== 'string' || !Array.isArray(bytes) || instance === undefined) return
    for (const [i, from] of peers.split(',').entries()) if (bytes[i] > 0) this.moved(from, instance, bytes[i])
  }

  get retries (): number {
    return this.retried.total
  }

  encoders (): ReadonlyArray<{ readonly node: string, readonly items: number, readonly cached: number }> {
    return [...this.#encoders.values()]
  }

  links (): ReadonlyArray<{ readonly from: string, readonly to: string, readonly bytes: number }> {
    return [...this.#links.values()]
  }

  requests (): Array<{ readonly plan: string, readonly outcome: string, readonly count: number }> {
    return this.served.samples().map(({ labels, value }) => ({ plan: labels[ATTR.topology]!, outcome: labels[ATTR.outcome]!, count: value }))
  }
}
