import type { FeatureCache, Lease, LeaseTable } from '../cache/index.ts'
import { MIGRATION_PROTOCOL } from '../../adapters/wire/distserve.ts'
import { FEATURES_FORMAT, type EncoderResultWire } from '../../adapters/wire/results.ts'
import { ROLE_TO_WIRE } from '../../adapters/wire/roles.ts'
import { ONE_DEVICE, type ChatAnswer, type ChatCall, type EngineCounters, type EngineInfo, type EngineLog, type EngineService, type GaugeName, type P2PLinks } from '../service/engine-service.ts'
import { EngineError } from '../service/errors.ts'
import { traceparentOf } from '../service/traceparent.ts'
import { LeaseGrants } from '../cache/lease-grants.ts'
import { featureBlockShape, type LoadedModel } from '../models/index.ts'
import { collectMedia } from './media-parts.ts'
import { Offers } from './offers.ts'
import type { EncodedItem, VisionRunner } from './vision-runner.ts'

/** A P2PNode, seen from here. */
export interface ClosableLinks extends P2PLinks {
  readonly problem?: string | undefined
  offer? (engineId: string, lease: string, traceparent?: string): void
  close (): Promise<void>
}

export interface EncoderEngineParts {
  readonly engineId: string
  readonly version: string
  readonly model: LoadedModel
  readonly cache: FeatureCache
  readonly leases: LeaseTable
  /** What is offered to consumers just now, by lease. */
  readonly offers?: Map<string, EncoderResultWire> | undefined
  readonly p2p: ClosableLinks
  readonly counters: EngineCounters
  /** Still starting when the engine is made. */
  readonly vision: Promise<VisionRunner>
  readonly leaseMs?: number | undefined
  readonly maxItems?: number | undefined
  readonly log: EngineLog
}

/** Encodes the pictures of a chat request and keeps their features for others to pull. Generates no text. */
export class EncoderEngine implements EngineService {
  readonly role = 'encoder'
  readonly backend = 'pytorch'
  readonly model: LoadedModel
  readonly p2p: ClosableLinks
  readonly counters: EngineCounters
  readonly ready: Promise<void>
  readonly #parts: EncoderEngineParts
  #vision: VisionRunner | undefined
  readonly #calls = new Map<string, AbortController>()
  readonly #grants: LeaseGrants
  #closing: Promise<void> | undefined

  constructor (parts: EncoderEngineParts) {
    this.#parts = parts
    this.#grants = new LeaseGrants(parts)
    this.model = parts.model
    this.p2p = parts.p2p
    this.counters = parts.counters
    this.ready = parts.vision.then(vision => { this.#vision = vision })
    // Awaited by the api_server; without a handler a failure before that would end the process.
    this.ready.catch(() => {})
  }

  get epoch (): number {
    return this.#parts.leases.epoch
  }

  get problem (): string | undefined {
    return this.#vision?.problem ?? this.p2p.problem
  }

  info (): EngineInfo {
    const { model, cache, version } = this.#parts
    const shape = featureBlockShape(model)
    return {
      ...ONE_DEVICE,
      block_size: shape.blockTokens,
      num_gpu_blocks: cache.pool.total,
      version,
      backend: this.backend,
      role: ROLE_TO_WIRE[this.role],
      epoch: this.epoch,
      model: model.name,
      fingerprint: model.fingerprint,
      vision: 'full',
      produces: [FEATURES_FORMAT],
      accepts: [],
      feature: { block_tokens: shape.blockTokens, hidden_size: shape.hiddenSize, dtype: shape.dtype, block_bytes: shape.blockBytes, num_blocks: cache.pool.total }
    }
  }

  gauges (): Partial<Record<GaugeName, number>> {
    const { total, free, cached } = this.#parts.cache.stats
    return { epd_feature_blocks_capacity: total, epd_feature_blocks_free: free, epd_feature_blocks_cached: cached, epd_leases_open: this.#grants.openCount }
  }

  sequences (): Readonly<Record<string, number>> {
    return { ...(this.#vision?.sequences() ?? { waiting: 0, preprocessing: 0, running: 0 }) }
  }

  /** The vision runner, for figures. */
  get vision (): VisionRunner | undefined {
    return this.#vision
  }

  /** @throws EngineError, or the signal's reason. */
  async chat (call: ChatCall): Promise<ChatAnswer> {
    if (this.#closing !== undefined) throw new EngineError('draining', 'the engine is shutting down')
    const items = collectMedia(call.body, this.#parts.maxItems === undefined ? {} : { maxItems: this.#parts.maxItems })
    if (items.length === 0) throw new EngineError('unsupported', 'this engine only encodes media: it has no decoder, and the request has no media item', { param: 'messages' })
    for (const { source, param } of items) {
      if (source.kind === 'epd') throw new EngineError('invalid_media', 'epd: URLs name features, an encoder needs the media itself', { param })
    }
    const stop = new AbortController()
    this.#calls.set(call.requestId, stop)
    const offers = call.overlap === undefined ? undefined : this.#offers(call)
    try {
      const vision = this.#vision ?? await this.#parts.vision
      const signal = AbortSignal.any([call.signal, stop.signal])
      const encoded = await vision.encode({ items, tenant: call.tenant, signal, context: call.context, progress: offers })
      return { status: 200, json: { object: 'encoder.result', model: this.model.name, encoder_result: this.#lease(encoded, call) } }
    } finally {
      offers?.end()
      this.#calls.delete(call.requestId)
    }
  }

  /** To the consumer, where it is linked. */
  #offers (call: ChatCall): Offers | undefined {
    const { cache, offers, p2p } = this.#parts
    const { consumer, context } = call
    if (offers === undefined || consumer === undefined) return undefined
    const { signal } = new AbortController()
    const names = namesOf(call.overlap)
    return new Offers(offers, {
      lease: (item, filled, index) => {
        cache.ref(item.entry)
        return { ...this.#lease([item], { ...call, signal }, filled)[0] as EncoderResultWire, for: names?.[index] }
      },
      send: lease => { p2p.offer?.(consumer, lease, traceparentOf(context)) },
      release: lease => { this.#grants.endSession(lease) }
    })
  }

  /** A lease for each item, which takes over a reference to it. */
  #lease (encoded: readonly EncodedItem[], call: ChatCall, filled?: Promise<void>): EncoderResultWire[] {
    const { model, cache, engineId } = this.#parts
    const leases = this.#grants.open(call, encoded.map(({ entry }) => ({ pool: 'feature', blocks: entry.blocks, filled, free: () => cache.unref(entry) })))
    return encoded.map((item, i) => {
      const { id, sessionId, blocks } = leases[i] as Lease
      return {
        message: item.item.message,
        part: item.item.part,
        content_hash: item.hash,
        modality: 'image',
        num_tokens: item.numTokens,
        grid: item.grid,
        hidden_size: model.hiddenSize,
        dtype: model.dtype,
        protocol: MIGRATION_PROTOCOL.tcp,
        remote_engine_id: engineId,
        epoch: this.epoch,
        lease: id,
        remote_session_id: sessionId,
        remote_block_ids: blocks,
        cached: item.cached
      }
    })
  }

  /** Also a request that was answered: a caller that aborts it has not read the answer, and knows none of its leases. */
  abort (requestId: string): boolean {
    const stop = this.#calls.get(requestId)
    stop?.abort(new EngineError('cancelled', 'the request was aborted'))
    return this.#grants.release(requestId) || stop !== undefined
  }

  endSession (id: number | string): void {
    this.#grants.endSession(id)
  }

  clearCache (): void {
    this.#parts.cache.clear()
  }

  close (): Promise<void> {
    this.#closing ??= this.#close()
    return this.#closing
  }

  async #close (): Promise<void> {
    for (const stop of this.#calls.values()) stop.abort(new EngineError('draining', 'the engine is shutting down'))
    const vision = await this.#parts.vision.catch(() => undefined)
    await vision?.close()
    await this.p2p.close()
    this.#grants.close()
  }
}

/** Of `<id>:<n>,<n>...` a name for each item: `<id>:<n>`. */
function namesOf (overlap = ''): string[] | undefined {
  const id = /^.*:/.exec(overlap)?.[0]
  return id === undefined ? undefined : overlap.slice(id.length).split(',').map(n => id + n)
}
