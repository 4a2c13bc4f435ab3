import type { Attributes } from '@opentelemetry/api'
import { ATTR } from '../../../adapters/wire/semconv.ts'
import { Semaphore } from '../../service/waiting.ts'
import type { RemoteMedia } from '../sequence/prompt.ts'
import type { Sequence } from '../sequence/sequence.ts'
import { finishEpdMigration, lockEpdMigration, startEpdMigration } from '../sequence/states.ts'
import type { FetchCall, Fetched } from './block-link.ts'
import { transferAttributes, type MigrationPath } from './migration-loop.ts'

/**
 * Brings the features of one media item into this engine. All items of a sequence are reserved before any is fetched; a
 * reservation of type `R` ends by one `fetch` or one `cancel`.
 */
export interface FeatureSource<R = unknown> {
  /** Finds the item in the cache, or reserves room that is there; undefined when it would have to wait. */
  tryReserve (media: RemoteMedia): R | undefined
  /** As `tryReserve`, and waits for room. Rejects with the signal's reason, or CacheError for lack of room. */
  reserve (media: RemoteMedia, signal: AbortSignal): Promise<R>
  /** Gives up a reservation. */
  cancel (reservation: R): void
  /** Pulls the features and ACKs the lease. Once it has settled, nothing writes to the item's blocks any more. */
  fetch (media: RemoteMedia, reservation: R, call: FetchCall): Promise<Fetched>
  /** Resolves when the ACKs under way have been answered. */
  settled (): Promise<void>
}

/** E -> PD: WAITING_EPD_MIGRATION to WAITING, by pulling the features of every media item that this engine did not encode. */
export class FeatureMigration implements MigrationPath<unknown[]> {
  readonly pool = 'feature'
  readonly moves = { start: startEpdMigration, lock: lockEpdMigration, finish: finishEpdMigration }
  readonly #source: FeatureSource
  /** One sequence at a time waits for blocks, so that no two wait for blocks that the other holds. */
  readonly #line = new Semaphore(1)

  constructor (source: FeatureSource) {
    this.#source = source
  }

  /** A sequence whose features are here, or have room, never waits behind one that lacks it. */
  async reserve (sequence: Sequence, signal: AbortSignal): Promise<unknown[]> {
    signal.throwIfAborted()
    const media = remoteMedia(sequence)
    const found = this.#tryReserve(media)
    if (found !== undefined) return found
    const leave = await this.#line.enter(signal)
    const reservations: unknown[] = []
    try {
      for (const item of media) reservations.push(await this.#source.reserve(item, signal))
      return reservations
    } catch (err) {
      this.cancel(reservations)
      throw err
    } finally {
      leave()
    }
  }

  /** All or nothing, at once. */
  #tryReserve (media: readonly RemoteMedia[]): unknown[] | undefined {
    const reservations: unknown[] = []
    for (const item of media) {
      const reservation = this.#source.tryReserve(item)
      if (reservation === undefined) {
        this.cancel(reservations)
        return undefined
      }
      reservations.push(reservation)
    }
    return reservations
  }

  cancel (reservations: readonly unknown[]): void {
    for (const reservation of reservations) this.#source.cancel(reservation)
  }

  /** All items at once. The first failure aborts the others; it is thrown when all have settled, because until then blocks are written. */
  async fetch (sequence: Sequence, reservations: readonly unknown[], call: FetchCall): Promise<Attributes> {
    const media = remoteMedia(sequence)
    const failed = new AbortController()
    const signal = AbortSignal.any([call.signal, failed.signal])
    let failure: unknown
    const results = await Promise.all(media.map(async (item, i) => {
      try {
        return await this.#source.fetch(item, reservations[i], { signal, context: call.context })
      } catch (err) {
        failure ??= err
        failed.abort(err)
        return undefined
      }
    }))
    if (failure !== undefined) throw failure
    return summary(media, results as Fetched[])
  }

  async settled (): Promise<void> {
    await this.#source.settled()
  }
}

function remoteMedia ({ media }: Sequence): RemoteMedia[] {
  return media.filter((item): item is RemoteMedia => item.source !== undefined)
}

function summary (media: readonly RemoteMedia[], fetched: readonly Fetched[]): Attributes {
  const peers = new Map<string, number>()
  for (const [i, { source: { engineId } }] of media.entries()) peers.set(engineId, (peers.get(engineId) ?? 0) + (fetched[i]?.bytes ?? 0))
  return {
    [ATTR.items]: media.length,
    [ATTR.cached]: fetched.filter(item => item.link === undefined).length,
    [ATTR.ahead]: fetched.filter(item => item.ahead === true).length,
    ...transferAttributes(peers, fetched.reduce((sum, item) => sum + item.blocks, 0), fetched.find(item => item.link !== undefined)?.link)
  }
}
