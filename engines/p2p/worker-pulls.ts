import type { Lease, LeaseTable, PullTicket } from '../cache/index.ts'
import type { FromWorker, Verdict } from './messages.ts'
import type { Refusal, Refusals } from './refusals.ts'
import type { P2PErrorCode } from './types.ts'

type AskPull = Extract<FromWorker, { op: 'ask-pull' }>
type AskEnd = Extract<FromWorker, { op: 'ask-end' }>

/** A consumer pulls a lease once. More than one attempt is for transfers that broke; more than these is no consumer's need. */
const MAX_PULLS_OF_LEASE = 8

/** What was pulled of a lease so far. */
interface Pulled {
  /** The engine that pulled first: the lease is its own from then on. */
  readonly by: string
  readonly ids: Set<string>
  blocks: number
}

/** Answers the transfer worker's questions from the lease table, and keeps the tickets of the pulls it serves. */
export class WorkerPulls {
  readonly #leases: LeaseTable
  readonly #refusals: Refusals
  readonly #isLinked: (engineId: string) => boolean
  readonly #tickets = new Map<number, PullTicket>()
  readonly #pulled = new WeakMap<Lease, Pulled>()

  /** @param isLinked whether an engine of this id is linked: a lease for it is pulled by no other */
  constructor (leases: LeaseTable, refusals: Refusals, isLinked: (engineId: string) => boolean) {
    this.#leases = leases
    this.#refusals = refusals
    this.#isLinked = isLinked
  }

  /** May these blocks be pulled? If so they stay until `endPull`. */
  beginPull (ask: AskPull): Verdict {
    const { lease: id, epoch } = ask
    const ticket = this.#leases.beginPull(id, epoch)
    if (ticket === 'STALE') return this.#refuse('stale', 'STALE', `lease ${id} is of another process of this engine`)
    if (ticket === 'GONE') return this.#refuse('gone', 'GONE', `lease ${id} has ended, or never was`)
    const refused = this.#checkPull(ask, ticket.lease)
    if (refused !== undefined) this.#leases.endPull(ticket)
    else this.#tickets.set(ask.ask, ticket)
    return refused ?? { ok: true }
  }

  #checkPull ({ from, id: pull, lease: id, pool, blocks }: AskPull, lease: Lease): Verdict | undefined {
    const leased = new Set(lease.blocks)
    if (lease.pool !== pool || new Set(blocks).size !== blocks.length || !blocks.every((block) => leased.has(block))) {
      return this.#refuse('blocks', 'REFUSED', `lease ${id} is for other blocks`)
    }
    if (this.#isForeign(lease, from)) return this.#foreign(id)
    const pulled = this.#pulled.get(lease) ?? { by: from, ids: new Set(), blocks: 0 }
    if (pulled.ids.has(pull)) return this.#refuse('replay', 'GONE', `pull ${pull} was made before`)
    if (pulled.blocks + blocks.length > MAX_PULLS_OF_LEASE * lease.blocks.length) return this.#refuse('spent', 'GONE', `lease ${id} was pulled too often`)
    pulled.ids.add(pull)
    pulled.blocks += blocks.length
    this.#pulled.set(lease, pulled)
  }

  endLease ({ from, lease: id, epoch, how }: AskEnd): Verdict {
    if (epoch !== this.#leases.epoch) return this.#refuse('stale', 'STALE', `lease ${id} is of another process of this engine`)
    const lease = this.#leases.get(id)
    if (lease !== undefined && this.#isForeign(lease, from)) return this.#foreign(id)
    return { ok: true, ended: this.#leases.end(id, how) }
  }

  /** A gateway may name the consumer by an alias, which no link is known by; then the first puller counts. */
  #isForeign (lease: Lease, from: string): boolean {
    const owner = this.#pulled.get(lease)?.by ?? (this.#isLinked(lease.consumer) ? lease.consumer : from)
    return owner !== from
  }

  #foreign (id: string): Verdict {
    return this.#refuse('foreign', 'GONE', `lease ${id} is another engine's`)
  }

  #refuse (reason: Refusal, code: P2PErrorCode, message: string): Verdict {
    this.#refusals.add(reason)
    return { ok: false, code, message }
  }

  endPull (ask: number): void {
    const ticket = this.#tickets.get(ask)
    if (ticket === undefined) return
    this.#tickets.delete(ask)
    this.#leases.endPull(ticket)
  }

  /** The worker is gone, so nothing reads blocks any more. */
  close (): void {
    for (const ask of [...this.#tickets.keys()]) this.endPull(ask)
  }
}
