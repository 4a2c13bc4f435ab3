import { randomBytes, randomInt } from 'node:crypto'
import type { PoolName } from './block-pool.ts'

export type LeaseEnd = 'ack' | 'release' | 'expired'

export interface LeaseOptions {
  /** Engine id of who will pull; for logs and metrics. */
  consumer: string
  pool: PoolName
  /** The blocks that may be pulled, and no others. */
  blocks: readonly number[]
  /** Milliseconds until the lease expires, counted anew after each pull. */
  ttlMs: number
  /** Set while the blocks are being filled: a pull waits for it. It never rejects; where the filling failed, the lease ends before. */
  filled?: Promise<void> | undefined
  /** Called once, when the lease has ended and no pull reads its blocks any more: the place to free or unref them. */
  onEnd: (reason: LeaseEnd) => void
}

export interface Lease {
  /** 16 hex digits, random: knowing it is the right to pull. */
  readonly id: string
  /** Positive integer for LMDeploy's `remote_session_id`; random, because knowing it is enough to end the lease. */
  readonly sessionId: number
  readonly consumer: string
  readonly pool: PoolName
  readonly blocks: readonly number[]
  readonly filled: Promise<void> | undefined
}

/** A pull in progress. The blocks stay until `endPull` has been called with it. */
export interface PullTicket {
  readonly lease: Lease
}

interface Entry extends Lease {
  ttlMs: number
  onEnd: (reason: LeaseEnd) => void
  pulls: number
  ended: LeaseEnd | undefined
  timer: NodeJS.Timeout | undefined
}

/**
 * Who may pull which blocks, until when. A lease ends once, by ACK, release or expiry, whichever comes first; what comes
 * later does nothing. Blocks are given back (`onEnd`) only when no pull reads them.
 */
export class LeaseTable {
  readonly epoch: number
  readonly #leases = new Map<string, Entry>()
  readonly #sessions = new Map<number, Entry>()
  readonly #draining = new Set<Entry>()

  /** @param epoch the engine's random number of this process start: leases of any other process are stale */
  constructor (epoch: number) {
    this.epoch = epoch
  }

  /** Leases whose blocks are not given back yet, those that only wait for a running pull included. */
  get openCount (): number {
    return this.#leases.size + this.#draining.size
  }

  open (options: LeaseOptions): Lease {
    const { consumer, pool, filled, ttlMs, onEnd } = options
    const entry: Entry = {
      id: randomBytes(8).toString('hex'),
      sessionId: this.#newSession(),
      consumer,
      pool,
      blocks: [...options.blocks],
      filled,
      ttlMs,
      onEnd,
      pulls: 0,
      ended: undefined,
      timer: undefined
    }
    this.#leases.set(entry.id, entry)
    this.#sessions.set(entry.sessionId, entry)
    this.#arm(entry)
    return entry
  }

  #newSession (): number {
    for (;;) {
      const id = randomInt(1, 2 ** 48 - 1)
      if (!this.#sessions.has(id)) return id
    }
  }

  get (id: string): Lease | undefined {
    return this.#leases.get(id)
  }

  bySession (sessionId: number): Lease | undefined {
    return this.#sessions.get(sessionId)
  }

  /** Starts a pull, which keeps the lease from expiring. STALE: of another process. GONE: unknown or ended. */
  beginPull (id: string, epoch: number): PullTicket | 'STALE' | 'GONE' {
    if (epoch !== this.epoch) return 'STALE'
    const entry = this.#leases.get(id)
    if (entry === undefined) return 'GONE'
    entry.pulls++
    clearTimeout(entry.timer)
    return { lease: entry }
  }

  /** Ends a pull, finished or not; a ticket is good for one `endPull`. */
  endPull (ticket: PullTicket): void {
    const entry = ticket.lease as Entry
    if (entry.pulls < 1) throw new Error(`lease ${entry.id}: no pull to end`)
    entry.pulls--
    if (entry.pulls > 0) return
    if (entry.ended !== undefined) this.#giveBack(entry)
    else this.#arm(entry)
  }

  /** Ends a lease. False when it is unknown or has ended already: repeats do nothing. */
  end (id: string, reason: LeaseEnd): boolean {
    const entry = this.#leases.get(id)
    if (entry === undefined) return false
    clearTimeout(entry.timer)
    entry.ended = reason
    this.#leases.delete(id)
    this.#sessions.delete(entry.sessionId)
    if (entry.pulls > 0) this.#draining.add(entry)
    else this.#giveBack(entry)
    return true
  }

  /** Ends every lease, when the engine closes. */
  close (): void {
    for (const id of [...this.#leases.keys()]) this.end(id, 'release')
  }

  #arm (entry: Entry): void {
    entry.timer = setTimeout(() => this.end(entry.id, 'expired'), entry.ttlMs)
    entry.timer.unref()
  }

  #giveBack (entry: Entry): void {
    this.#draining.delete(entry)
    entry.onEnd(entry.ended as LeaseEnd)
  }
}
