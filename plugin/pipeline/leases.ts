import type { Adapter, AdapterNode, Call, EncoderResult, Handoff, LeaseRef } from '../../adapters/adapter.ts'

interface HeldLease { readonly adapter: Adapter, readonly lease: LeaseRef }

/** The request. */
interface Holder {
  readonly closed: boolean
  callAside (work: (call: Call) => Promise<void>): void
}

/** What nodes hold for one request: encoders its features, P its KV blocks. */
export class Leases {
  readonly #holder: Holder
  #features: HeldLease[] = []
  #handoff: HeldLease | undefined

  constructor (holder: Holder) {
    this.#holder = holder
  }

  hold (adapter: Adapter, node: AdapterNode, results: readonly EncoderResult[]): void {
    for (const { lease, wire } of results) this.#features.push({ adapter, lease: { node, lease, wire } })
    if (this.#holder.closed) this.release()
  }

  /** Of a prefill; D ends it, unless `release` comes before. */
  holdHandoff (adapter: Adapter, node: AdapterNode, { lease, wire }: Handoff): void {
    this.#handoff = { adapter, lease: { node, lease, wire } }
    if (this.#holder.closed) this.release()
  }

  /** D has the KV blocks and has told P so: ending the lease once more could end another request's. */
  forgetHandoff (): void {
    this.#handoff = undefined
  }

  /** The consumer has ACKed the features. */
  forgetFeatures (): void {
    this.#features = []
  }

  release (): void {
    const held = this.#handoff === undefined ? this.#features : [...this.#features, this.#handoff]
    this.#features = []
    this.#handoff = undefined
    for (const adapter of new Set(held.map(one => one.adapter))) {
      const leases = held.filter(one => one.adapter === adapter).map(one => one.lease)
      this.#holder.callAside(call => adapter.release(leases, call))
    }
  }
}
