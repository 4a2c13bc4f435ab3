import type { EncoderResultWire } from '../../adapters/wire/results.ts'
import { deferred } from '../service/waiting.ts'
import type { EncodedItem } from './vision-runner.ts'

interface Offer {
  readonly lease: string
  readonly filled: () => void
}

export interface OffersOfCall {
  /** A lease of its own, beside that of the answer, on blocks that are `filled` when the promise resolves. */
  lease (item: EncodedItem, filled: Promise<void>, index: number): EncoderResultWire
  /** Tells the consumer. */
  send (lease: string): void
  release (lease: string): void
}

/**
 * Items of one encode call, offered to the consumer as soon as their blocks are chosen. It asks for them while they are
 * filled, and has them when the call is answered. The offers end with the call: whoever has not begun to pull by then goes by
 * the answer.
 */
export class Offers {
  readonly #known: Map<string, EncoderResultWire>
  readonly #call: OffersOfCall
  readonly #open = new Map<number, Offer>()
  #ended = false

  /** @param known of all calls, by lease: what the consumer is answered when it asks */
  constructor (known: Map<string, EncoderResultWire>, call: OffersOfCall) {
    this.#known = known
    this.#call = call
  }

  /** The item's blocks are chosen. A call that others joined may have ended by now. */
  placed (item: EncodedItem, index: number): void {
    if (this.#ended) return
    const { promise, resolve } = deferred<void>()
    const offered = this.#call.lease(item, promise, index)
    this.#known.set(offered.lease, offered)
    this.#open.set(index, { lease: offered.lease, filled: resolve })
    this.#call.send(offered.lease)
  }

  /** The item's features are there. */
  encoded (index: number): void {
    this.#open.get(index)?.filled()
  }

  end (): void {
    this.#ended = true
    for (const { lease, filled } of this.#open.values()) {
      this.#known.delete(lease)
      this.#call.release(lease)
      // After the end of the lease: a pull that waits finds that it has ended.
      filled()
    }
  }
}
