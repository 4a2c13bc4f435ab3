/** One worker as the primary sees it: what happens there happens here once more, and what it holds is given back when it dies. */
import type { Log } from '../../../adapters/adapter.ts'
import { isEpdError } from '../../errors.ts'
import type { Gateway } from '../../gateway.ts'
import type { Rates } from '../../http/keys/rates.ts'
import type { Pass } from '../../pipeline/admission.ts'
import type { Ticket } from '../../registry/index.ts'
import type { Event, ToPrimary } from './calls.ts'

/** What the primary counts for all workers. */
export interface Counts {
  readonly gateway: Gateway
  readonly rates: Rates
  /** Requests in flight by the name of their key. */
  readonly byKey: Map<string, number>
  readonly log: Log
}

/** What it was is in the worker's log, and in what it measures. */
const FAILED = new Error('a use at a worker has failed')

type Shared = Pick<ToPrimary, 'happened' | 'enter' | 'leaveEncoders' | 'leave' | 'takeRate' | 'beginWithKey' | 'endWithKey'>

export class Member {
  readonly #counts: Counts
  readonly #uses = new Map<number, Ticket>()
  readonly #waiting = new Map<number, AbortController>()
  readonly #passes = new Map<number, Pass>()
  readonly #keys = new Map<string, number>()
  inFlight = 0

  constructor (counts: Counts) {
    this.#counts = counts
  }

  readonly calls: Shared = {
    happened: events => { for (const event of events) this.#happened(event) },

    enter: async ({ id, work }) => {
      const ending = new AbortController()
      this.#waiting.set(id, ending)
      try {
        const pass = await this.#counts.gateway.admission.enter(work, ending.signal)
        if (ending.signal.aborted) pass.release()
        else this.#passes.set(id, pass)
        return { admitted: true }
      } catch (err) {
        return { admitted: false, retryAfter: isEpdError(err) ? err.retryAfter : undefined }
      } finally {
        this.#waiting.delete(id)
      }
    },

    leaveEncoders: id => { this.#passes.get(id)?.leaveEncoders() },

    leave: id => {
      this.#waiting.get(id)?.abort(new Error('the request has left'))
      this.#passes.get(id)?.release()
      this.#passes.delete(id)
    },

    takeRate: async ({ key, kind, amount }) => {
      try {
        return { rate: await this.#counts.rates.take(key, kind, amount) }
      } catch (err) {
        return { away: (err as Error).message }
      }
    },

    beginWithKey: ({ name, concurrency }) => {
      const busy = this.#counts.byKey.get(name) ?? 0
      if (concurrency !== undefined && busy >= concurrency) return false
      this.#change(name, 1)
      return true
    },

    endWithKey: name => { this.#change(name, -1) }
  }

  /** The worker is gone: what it had in flight is over. */
  gone (): void {
    for (const ticket of this.#uses.values()) ticket.end(new Error('the worker is gone'), 'unclear')
    for (const ending of this.#waiting.values()) ending.abort(new Error('the worker is gone'))
    for (const pass of this.#passes.values()) pass.release()
    for (const [name, held] of this.#keys) this.#change(name, -held)
    this.inFlight = 0
  }

  #change (name: string, by: number): void {
    for (const counts of [this.#keys, this.#counts.byKey]) {
      const left = (counts.get(name) ?? 0) + by
      if (left > 0) counts.set(name, left)
      else counts.delete(name)
    }
  }

  #happened (event: Event): void {
    const { gateway } = this.#counts
    switch (event[0]) {
      case 'use': this.#uses.set(event[1], gateway.registry.acquire(event[2], event[3], event[4], event[5])); return
      case 'ok': this.#uses.get(event[1])?.ok(); return
      case 'encoded': this.#uses.get(event[1])?.encoded(event[2]); return
      case 'end':
        this.#uses.get(event[1])?.end(event[2] ? FAILED : undefined, event[3])
        this.#uses.delete(event[1])
        return
      case 'span': gateway.tracing.store?.add(event[1]); return
      case 'inFlight': this.inFlight = event[1]; return
      case 'counted': gateway.stats[event[1]].add(event[2], ...event[3].map(known)); return
      case 'measured': gateway.metrics[event[1]].record(event[2], event[3].map(known), event[4] ?? undefined); return
      case 'items': gateway.stats.encoded(event[1], event[2], event[3]); return
      case 'moved':
        gateway.stats.encodeMoves += event[1]
        gateway.stats.encodeFallbacks += event[2]
    }
  }
}

/** JSON has no undefined. */
function known (label: string | null): string | undefined {
  return label ?? undefined
}
