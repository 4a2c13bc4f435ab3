import type { Attributes } from '@opentelemetry/api'
import { ATTR } from '../../../adapters/wire/semconv.ts'
import type { FetchCall, Fetched } from './block-link.ts'
import type { FeatureSource, RemoteMedia } from './feature-source.ts'
import { transferAttributes, type MigrationPath } from './migration-loop.ts'
import type { Sequence } from '../sequence/sequence.ts'
import { finishEpdMigration, lockEpdMigration, startEpdMigration } from '../sequence/states.ts'

/** E -> PD: WAITING_EPD_MIGRATION to WAITING, by pulling the features of every media item the sequence has not got. */
export class FeatureMigration implements MigrationPath<unknown[]> {
  readonly pool = 'feature'
  readonly moves = { start: startEpdMigration, lock: lockEpdMigration, finish: finishEpdMigration }
  readonly #source: FeatureSource
  /** One sequence at a time collects blocks, so that no two wait for what the other holds. */
  #reserving: Promise<unknown> = Promise.resolve()

  constructor (source: FeatureSource) {
    this.#source = source
  }

  async claim (sequence: Sequence, signal: AbortSignal): Promise<unknown[]> {
    const turn = this.#reserving.then(async () => {
      const claims: unknown[] = []
      try {
        for (const item of remoteMedia(sequence)) claims.push(await this.#source.claim(item, signal))
        return claims
      } catch (err) {
        this.drop(claims)
        throw err
      }
    })
    this.#reserving = turn.catch(() => {})
    return await turn
  }

  drop (claims: readonly unknown[]): void {
    for (const claim of claims) this.#source.drop(claim)
  }

  /** All items at once. The first failure ends the others, and all have ended before it is told: blocks are still being written. */
  async fetch (sequence: Sequence, claims: readonly unknown[], call: FetchCall): Promise<Attributes> {
    const media = remoteMedia(sequence)
    const failed = new AbortController()
    const signal = AbortSignal.any([call.signal, failed.signal])
    let failure: unknown
    const results = await Promise.all(media.map(async (item, i) => {
      try {
        return await this.#source.fetch(item, claims[i], { signal, context: call.context })
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
    ...transferAttributes(peers, fetched.reduce((sum, item) => sum + item.blocks, 0), fetched.find(item => item.link !== undefined)?.link)
  }
}
