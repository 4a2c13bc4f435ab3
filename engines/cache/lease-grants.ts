import type { Lease, LeaseEnd, LeaseTable, PoolName } from './index.ts'
import type { ChatCall, EngineCounters, EngineLog } from '../service/engine-service.ts'

/** How long a consumer has to begin its pull. */
export const DEFAULT_LEASE_MS = 60_000

export interface LeaseGrantsOptions {
  readonly leases: LeaseTable
  readonly counters: EngineCounters
  readonly log: EngineLog
  /** @default DEFAULT_LEASE_MS */
  readonly leaseMs?: number | undefined
}

/** Blocks to be pulled by the consumer of a call; `free` is called once, when their lease has ended and no pull reads them. */
export interface Grant {
  readonly pool: PoolName
  readonly blocks: readonly number[]
  /** As of LeaseOptions. */
  readonly filled?: Promise<void> | undefined
  readonly free: () => void
}

/**
 * Leases an engine gives out with its answers. Each ends once: by the consumer's ACK, by free_cache, by expiry, or with
 * the call that it answered, when the caller has left or aborted it: no other caller knows of the lease.
 */
export class LeaseGrants {
  readonly #options: LeaseGrantsOptions
  /** Open leases by the id of the request they were opened for; a gateway may send several calls with one id. */
  readonly #granted = new Map<string, Set<string>>()

  constructor (options: LeaseGrantsOptions) {
    this.#options = options
  }

  get epoch (): number {
    return this.#options.leases.epoch
  }

  get openCount (): number {
    return this.#options.leases.openCount
  }

  /** A lease for each, in their order. */
  open (call: Pick<ChatCall, 'requestId' | 'consumer' | 'signal'>, grants: readonly Grant[]): Lease[] {
    const leases = grants.map(grant => this.#open(call, grant))
    const release = (): void => { for (const { id } of leases) this.#options.leases.end(id, 'release') }
    // A caller that leaves while the answer is on its way never reads the leases, so it can't end them.
    if (call.signal.aborted) release()
    else call.signal.addEventListener('abort', release, { once: true })
    return leases
  }

  #open ({ requestId, consumer = '' }: Pick<ChatCall, 'requestId' | 'consumer'>, { pool, blocks, filled, free }: Grant): Lease {
    const { leases, leaseMs = DEFAULT_LEASE_MS } = this.#options
    const granted = this.#granted.get(requestId) ?? new Set()
    this.#granted.set(requestId, granted)
    const onEnd = (reason: LeaseEnd): void => {
      granted.delete(lease.id)
      if (granted.size === 0 && this.#granted.get(requestId) === granted) this.#granted.delete(requestId)
      this.#ended(lease, reason)
      free()
    }
    const lease = leases.open({ consumer, pool, blocks, filled, ttlMs: leaseMs, onEnd })
    granted.add(lease.id)
    return lease
  }

  #ended ({ id, pool, consumer }: Lease, reason: LeaseEnd): void {
    if (reason === 'ack') this.#options.counters.acks++
    if (reason === 'expired') this.#options.log.warn({ lease: id, pool, consumer }, 'lease expired: its blocks were neither pulled nor released')
  }

  /** Ends what was opened for a request, answered or not. False: nothing is open. */
  release (requestId: string): boolean {
    const granted = this.#granted.get(requestId)
    for (const id of [...granted ?? []]) this.#options.leases.end(id, 'release')
    return granted !== undefined
  }

  /** By session id or lease id; repeats and unknown ids do nothing. */
  endSession (id: number | string): void {
    const { leases } = this.#options
    const lease = typeof id === 'number' ? leases.bySession(id)?.id : id
    if (lease !== undefined) leases.end(lease, 'release')
  }

  /** Ends every lease, when the engine closes. */
  close (): void {
    this.#options.leases.close()
  }
}
