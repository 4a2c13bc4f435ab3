import type { LeaseTable, PullTicket } from '../cache/index.ts'
import type { FromWorker, Verdict } from './messages.ts'

type AskPull = Extract<FromWorker, { op: 'ask-pull' }>
type AskEnd = Extract<FromWorker, { op: 'ask-end' }>

/** Answers the transfer worker's questions from the lease table, and keeps the tickets of the pulls it serves. */
export class WorkerPulls {
  readonly #leases: LeaseTable
  readonly #tickets = new Map<number, PullTicket>()

  constructor (leases: LeaseTable) {
    this.#leases = leases
  }

  /** May these blocks be pulled? If so they stay until `endPull`. */
  beginPull ({ ask, lease: id, epoch, pool, blocks }: AskPull): Verdict {
    const ticket = this.#leases.beginPull(id, epoch)
    if (ticket === 'STALE') return { ok: false, code: 'STALE', message: `lease ${id} is of another process of this engine` }
    if (ticket === 'GONE') return { ok: false, code: 'GONE', message: `lease ${id} has ended, or never was` }
    const { lease } = ticket
    const leased = new Set(lease.blocks)
    if (lease.pool !== pool || !blocks.every((block) => leased.has(block))) {
      this.#leases.endPull(ticket)
      return { ok: false, code: 'REFUSED', message: `lease ${id} is for other blocks` }
    }
    this.#tickets.set(ask, ticket)
    return { ok: true }
  }

  endLease ({ lease: id, epoch, how }: AskEnd): Verdict {
    if (epoch !== this.#leases.epoch) return { ok: false, code: 'STALE', message: `lease ${id} is of another process of this engine` }
    return { ok: true, ended: this.#leases.end(id, how) }
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
