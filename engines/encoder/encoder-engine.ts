import type { FeatureCache, LeaseEnd, LeaseTable } from '../cache/index.ts'
import type { EngineCounters } from '../counters.ts'
import { ENGINE_ROLE_TO_WIRE, type ChatAnswer, type ChatCall, type EngineInfo, type EngineLog, type EngineService, type GaugeName, type P2PLinks } from '../engine-service.ts'
import { EngineError } from '../errors.ts'
import { featureBlockShape, type LoadedModel } from '../models/index.ts'
import { collectMedia } from './media-parts.ts'
import type { EncodedItem, VisionRunner } from './vision-runner.ts'

/** How long a consumer has to begin its pull. */
export const DEFAULT_LEASE_MS = 60_000

/** What the engine answers per media item; snake_case, as it travels. */
export interface EncoderResultWire {
  readonly message: number
  readonly part: number
  readonly content_hash: string
  readonly modality: 'image'
  readonly num_tokens: number
  readonly grid: readonly number[]
  readonly hidden_size: number
  readonly dtype: 'float32' | 'float16'
  /** LMDeploy's MigrationProtocol: 1 is TCP. */
  readonly protocol: 1
  readonly remote_engine_id: string
  readonly epoch: number
  readonly lease: string
  readonly remote_session_id: number
  readonly remote_block_ids: readonly number[]
  readonly cached: boolean
}

/** A P2PNode, seen from here. */
export interface ClosableLinks extends P2PLinks {
  close (): Promise<void>
}

export interface EncoderEngineParts {
  readonly engineId: string
  readonly version: string
  readonly model: LoadedModel
  readonly cache: FeatureCache
  readonly leases: LeaseTable
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
  /** Open leases by the request they were opened for. */
  readonly #granted = new Map<string, Set<string>>()
  #closing: Promise<void> | undefined

  constructor (parts: EncoderEngineParts) {
    this.#parts = parts
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

  info (): EngineInfo {
    const { model, cache, version } = this.#parts
    const shape = featureBlockShape(model)
    return {
      tp_size: 1,
      ep_size: 1,
      dp_size: 1,
      pp_size: null,
      dp_rank: 0,
      block_size: shape.blockTokens,
      num_cpu_blocks: 0,
      num_gpu_blocks: cache.pool.total,
      engine: 'fastify-epd',
      version,
      backend: this.backend,
      role: ENGINE_ROLE_TO_WIRE[this.role],
      epoch: this.epoch,
      model: model.name,
      fingerprint: model.fingerprint,
      vision: 'full',
      produces: ['features:epd-zmq/1'],
      accepts: [],
      feature: { block_tokens: shape.blockTokens, hidden_size: shape.hiddenSize, dtype: shape.dtype, block_bytes: shape.blockBytes, num_blocks: cache.pool.total }
    }
  }

  gauges (): Partial<Record<GaugeName, number>> {
    const { total, free, cached } = this.#parts.cache.stats
    return { epd_feature_blocks_total: total, epd_feature_blocks_free: free, epd_feature_blocks_cached: cached, epd_leases_open: this.#parts.leases.openCount }
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
    try {
      const vision = this.#vision ?? await this.#parts.vision
      const signal = AbortSignal.any([call.signal, stop.signal])
      const encoded = await vision.encode({ items, tenant: call.tenant, signal, context: call.context })
      return { status: 200, json: { object: 'encoder.result', model: this.model.name, encoder_result: this.#lease(encoded, call) } }
    } finally {
      this.#calls.delete(call.requestId)
    }
  }

  /** A lease for each item, which takes over the reference the item came with. */
  #lease (encoded: readonly EncodedItem[], call: ChatCall): EncoderResultWire[] {
    const { leases, model, leaseMs = DEFAULT_LEASE_MS, engineId } = this.#parts
    const granted = new Set<string>()
    const results = encoded.map(item => {
      const { blocks } = item.entry
      const onEnd = (reason: LeaseEnd): void => {
        granted.delete(lease.id)
        if (granted.size === 0 && this.#granted.get(call.requestId) === granted) this.#granted.delete(call.requestId)
        this.#endLease(item, reason)
      }
      const lease = leases.open({ consumer: call.consumer ?? '', pool: 'feature', blocks, ttlMs: leaseMs, onEnd })
      granted.add(lease.id)
      return {
        message: item.item.message,
        part: item.item.part,
        content_hash: item.hash,
        modality: 'image' as const,
        num_tokens: item.numTokens,
        grid: item.grid,
        hidden_size: model.hiddenSize,
        dtype: model.dtype,
        protocol: 1 as const,
        remote_engine_id: engineId,
        epoch: this.epoch,
        lease: lease.id,
        remote_session_id: lease.sessionId,
        remote_block_ids: blocks,
        cached: item.cached
      }
    })
    this.#granted.set(call.requestId, granted)
    // A client that goes away while the answer is on its way never read the leases, so nobody will end them.
    if (call.signal.aborted) this.#release(granted)
    else call.signal.addEventListener('abort', () => this.#release(granted), { once: true })
    return results
  }

  #release (ids: ReadonlySet<string>): void {
    for (const id of [...ids]) this.#parts.leases.end(id, 'release')
  }

  #endLease (item: EncodedItem, reason: LeaseEnd): void {
    if (reason === 'ack') this.counters.acks++
    if (reason === 'expired') this.#parts.log.warn({ content_hash: item.hash }, 'lease expired: nobody pulled or released these features')
    this.#parts.cache.unref(item.entry)
  }

  /** Also a request that was answered: whoever aborts it has not read the answer, and knows none of its leases. */
  abort (requestId: string): boolean {
    const stop = this.#calls.get(requestId)
    stop?.abort(new EngineError('cancelled', 'the request was aborted'))
    const granted = this.#granted.get(requestId)
    if (granted !== undefined) this.#release(granted)
    return stop !== undefined || granted !== undefined
  }

  endSession (id: number | string): void {
    const { leases } = this.#parts
    const lease = typeof id === 'number' ? leases.bySession(id)?.id : id
    if (lease !== undefined) leases.end(lease, 'release')
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
    this.#parts.leases.close()
  }
}
