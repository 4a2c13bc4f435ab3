import { SpanStatusCode, trace } from '@opentelemetry/api'
import { ENGINE_ATTR, ENGINE_SPAN, ENGINE_TRACER_NAME } from '../semconv.ts'
import { spanTime } from '../span-clock.ts'
import type { Fetched, FeatureSource, RemoteMedia } from './feature-link.ts'
import { migrationError } from './migration-error.ts'
import type { Sequence } from './sequence.ts'
import { failEpdMigration, finishEpdMigration, lockEpdMigration, startEpdMigration } from './sequence-states.ts'

export interface MigrationOptions {
  readonly fetcher: FeatureSource
  /** Sequences that migrate at once. */
  readonly concurrency: number
  /** The sequence is WAITING (true), or STOPPED or ABORTED (false). */
  onSettled (sequence: Sequence, migrated: boolean): void
}

/** The loop beside the main loop: takes sequences from WAITING_EPD_MIGRATION to WAITING, and never holds up decoding. */
export class MigrationLoop {
  readonly #options: MigrationOptions
  readonly #queue: Sequence[] = []
  readonly #active = new Map<Sequence, AbortController>()
  /** One sequence at a time collects blocks, so that no two wait for what the other holds. */
  #reserving: Promise<unknown> = Promise.resolve()

  constructor (options: MigrationOptions) {
    this.#options = options
  }

  /** Takes a WAITING_EPD_MIGRATION sequence. */
  add (sequence: Sequence): void {
    this.#queue.push(sequence)
    this.#pump()
  }

  /** The sequence was interrupted: it leaves the queue, or its pulls are told to end. */
  cancel (sequence: Sequence): void {
    const at = this.#queue.indexOf(sequence)
    if (at >= 0) this.#queue.splice(at, 1)
    this.#active.get(sequence)?.abort(sequence.interruption?.error)
  }

  #pump (): void {
    while (this.#active.size < this.#options.concurrency) {
      const sequence = this.#queue.shift()
      if (sequence === undefined) return
      const controller = new AbortController()
      this.#active.set(sequence, controller)
      startEpdMigration(sequence)
      this.#migrate(sequence, controller).then(migrated => {
        this.#active.delete(sequence)
        this.#options.onSettled(sequence, migrated)
        this.#pump()
      })
    }
  }

  /** Walks one sequence through its states. Never rejects. */
  async #migrate (sequence: Sequence, controller: AbortController): Promise<boolean> {
    const span = trace.getTracer(ENGINE_TRACER_NAME).startSpan(ENGINE_SPAN.migrate, { startTime: spanTime() }, sequence.context)
    const media = sequence.media.filter((item): item is RemoteMedia => item.source !== undefined)
    try {
      const claims = await this.#claimInTurn(media, controller.signal)
      if (!lockEpdMigration(sequence)) {
        for (const claim of claims) this.#options.fetcher.drop(claim)
        return false
      }
      const fetched = await this.#fetchAll(media, claims, controller, trace.setSpan(sequence.context, span))
      span.setAttributes(summary(media, fetched))
      return finishEpdMigration(sequence)
    } catch (err) {
      const error = migrationError(err)
      span.recordException(error)
      span.setStatus({ code: SpanStatusCode.ERROR, message: error.message })
      failEpdMigration(sequence, error)
      return false
    } finally {
      span.end(spanTime())
    }
  }

  async #claimInTurn (media: readonly RemoteMedia[], signal: AbortSignal): Promise<unknown[]> {
    const turn = this.#reserving.then(async () => {
      const claims: unknown[] = []
      try {
        for (const item of media) claims.push(await this.#options.fetcher.claim(item, signal))
        return claims
      } catch (err) {
        for (const claim of claims) this.#options.fetcher.drop(claim)
        throw err
      }
    })
    this.#reserving = turn.catch(() => {})
    return await turn
  }

  /** All items at once. The first failure ends the others, and all have ended before it is told: blocks are still being written. */
  async #fetchAll (media: readonly RemoteMedia[], claims: readonly unknown[], controller: AbortController, context: Sequence['context']): Promise<Fetched[]> {
    let failure: unknown
    const results = await Promise.all(media.map(async (item, i) => {
      try {
        return await this.#options.fetcher.fetch(item, claims[i], { signal: controller.signal, context })
      } catch (err) {
        failure ??= err
        controller.abort(err)
        return undefined
      }
    }))
    if (failure !== undefined) throw failure
    return results as Fetched[]
  }
}

function summary (media: readonly RemoteMedia[], fetched: readonly Fetched[]): Record<string, number | string | number[]> {
  const sum = (key: 'bytes' | 'blocks'): number => fetched.reduce((total, item) => total + item[key], 0)
  const link = fetched.find(item => item.link !== undefined)?.link
  const bytes = new Map<string, number>()
  for (const [i, item] of media.entries()) bytes.set(item.source.engineId, (bytes.get(item.source.engineId) ?? 0) + (fetched[i]?.bytes ?? 0))
  return {
    [ENGINE_ATTR.items]: media.length,
    [ENGINE_ATTR.cached]: fetched.filter(item => item.link === undefined).length,
    [ENGINE_ATTR.bytes]: sum('bytes'),
    [ENGINE_ATTR.blocks]: sum('blocks'),
    [ENGINE_ATTR.peer]: [...bytes.keys()].join(','),
    [ENGINE_ATTR.peerBytes]: [...bytes.values()],
    ...(link === undefined ? {} : { [ENGINE_ATTR.link]: link })
  }
}
