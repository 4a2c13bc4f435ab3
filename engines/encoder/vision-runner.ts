import { setMaxListeners } from 'node:events'
import type { Context } from '@opentelemetry/api'
import { CacheError, type FeatureCache, type FeatureEntry } from '../cache/index.ts'
import type { EngineCounters, EngineLog } from '../service/engine-service.ts'
import type { MediaPolicy } from '../service/engine-options.ts'
import { EngineError } from '../service/errors.ts'
import { Semaphore } from '../service/waiting.ts'
import { featureBlocksFor, type LoadedModel, type PixelSettings, type PreparedItem } from '../models/index.ts'
import type { Device } from '../runtime/index.ts'
import { contentHash, Flights } from './flights.ts'
import { EncodeStage, type VisionStats } from './encode-stage.ts'
import { toEngineError } from './media-error.ts'
import { MediaLoader } from './media-loader.ts'
import { settingsKey, type MediaItem } from './media-parts.ts'
import { DECODE_CONCURRENCY, PrepareStage } from './prepare-stage.ts'

export const DEFAULT_MAX_BATCH_ITEMS = 8
export const DEFAULT_MAX_QUEUE = 256
const DEFAULT_ROOM_TIMEOUT_MS = 5_000

export interface VisionOptions {
  /** Loaded with `vision: true`. */
  readonly model: LoadedModel
  readonly device: Device
  /** Threads of the vision session. */
  readonly threads: number
  /** Over a pool of `featureBlockShape(model)` blocks. */
  readonly cache: FeatureCache
  readonly media: MediaPolicy
  readonly counters: EngineCounters
  readonly log?: EngineLog | undefined
  /** Items in one run. @default 8 */
  readonly maxBatchSize?: number | undefined
  /** Items waiting or under way before `busy`. @default 256 */
  readonly maxQueue?: number | undefined
  /** How long an item waits for feature blocks before `busy`, milliseconds. @default 5000 */
  readonly roomTimeoutMs?: number | undefined
  /** Replaces the loader of media; the runner closes it. */
  readonly loader?: Pick<MediaLoader, 'load' | 'close'> | undefined
}

export interface EncodeRequest {
  readonly items: readonly MediaItem[]
  /** Separates caches of different customers. */
  readonly tenant?: string | undefined
  readonly signal: AbortSignal
  /** Parent of the spans. */
  readonly context: Context
  readonly progress?: Progress | undefined
}

/** Hears of items that this request is the first to ask for. */
export interface Progress {
  /** Its blocks are chosen, and its features will be in them. Takes over no reference. */
  placed (item: EncodedItem, index: number): void
  /** Its features are there. It is not called when the item fails. */
  encoded (index: number): void
}

/** Features of one item, in feature blocks. The caller holds one reference and gives it back with `cache.unref(entry)`. */
export interface EncodedItem {
  readonly item: MediaItem
  readonly hash: string
  readonly entry: FeatureEntry
  readonly numTokens: number
  readonly grid: readonly number[]
  /** The features were there, or already being made for another request. */
  readonly cached: boolean
}

/** A picture to make features of. */
interface Order {
  readonly hash: string
  readonly bytes: Uint8Array
  readonly settings: PixelSettings
  readonly context: Context
  placed (entry: FeatureEntry): void
}

/**
 * From media items to features in blocks: load, look up by content hash, preprocess, batch, encode. The encoder engine
 * and an LLM engine with vision weights use this very code, so that both make the same features of a picture.
 */
export class VisionRunner {
  readonly #options: VisionOptions
  readonly #prepare: PrepareStage
  readonly #encode: EncodeStage
  readonly #loader: Pick<MediaLoader, 'load' | 'close'>
  readonly #flights = new Flights<FeatureEntry>()
  readonly #places: Semaphore
  #pending = 0
  #asides = 0

  private constructor (options: VisionOptions, prepare: PrepareStage, encode: EncodeStage, maxItems: number) {
    this.#options = options
    this.#prepare = prepare
    this.#encode = encode
    this.#loader = options.loader ?? new MediaLoader({ policy: options.media })
    // Prepared pixels are large: enough for the running batch's successor, and no more.
    this.#places = new Semaphore(2 * maxItems + DECODE_CONCURRENCY)
  }

  /** Starts the session worker and the preprocessing worker. @throws when the graph or a package can't be loaded. */
  static async open (options: VisionOptions): Promise<VisionRunner> {
    const { model, device, threads, cache, counters, maxBatchSize: maxItems = DEFAULT_MAX_BATCH_ITEMS, log } = options
    const prepare = await PrepareStage.open(model, log)
    try {
      const encode = await EncodeStage.open({ model, device, threads, cache, counters, maxItems, expected: () => prepare.active, log })
      return new VisionRunner(options, prepare, encode, maxItems)
    } catch (err) {
      await prepare.close()
      throw err
    }
  }

  /** Why it does not work just now. */
  get problem (): string | undefined {
    return this.#prepare.problem ?? this.#encode.problem
  }

  get stats (): VisionStats {
    return this.#encode.stats
  }

  /** Items by what happens to them. */
  sequences (): { waiting: number, preprocessing: number, running: number } {
    const preprocessing = this.#prepare.active
    const { running } = this.#encode
    return { waiting: Math.max(0, this.#pending - preprocessing - running), preprocessing, running }
  }

  /**
   * Features of every item, in order. All or nothing: when one item fails, the others are given back.
   * @throws EngineError naming the part (`invalid_media`, `media_fetch_failed`, `busy`), or the signal's reason.
   */
  async encode (request: EncodeRequest): Promise<EncodedItem[]> {
    const { items, signal } = request
    const { cache, maxQueue = DEFAULT_MAX_QUEUE } = this.#options
    if (this.#pending + items.length > maxQueue) throw new EngineError('busy', `${this.#pending} media items already wait to be encoded`)
    this.#pending += items.length
    const stop = new AbortController()
    const either = AbortSignal.any([signal, stop.signal])
    // Each picture listens.
    setMaxListeners(0, either)
    let failure: { reason: unknown } | undefined
    const results = await Promise.all(items.map((item, i) => this.#encodeItem(item, i, request, either).catch((reason: unknown) => {
      failure ??= { reason: signal.aborted ? signal.reason : toEngineError(reason, item.param) }
      stop.abort(failure.reason)
      return undefined
    }).finally(() => { this.#pending-- })))
    const encoded = results.filter(result => result !== undefined)
    if (failure === undefined) return encoded
    for (const { entry } of encoded) cache.unref(entry)
    throw failure.reason
  }

  async #encodeItem (item: MediaItem, index: number, request: EncodeRequest, signal: AbortSignal): Promise<EncodedItem> {
    const { cache, counters, model } = this.#options
    const bytes = await this.#loader.load(item.source, signal)
    signal.throwIfAborted()
    const hash = contentHash(bytes, {
      fingerprint: model.fingerprint, vision: model.visionIdentity ?? '', settings: settingsKey(item.settings), tenant: request.tenant ?? ''
    })
    // A flight that its last consumer left still owns its entry; what it leaves behind is known only when it has ended.
    for (let ending = this.#flights.ending(hash); ending !== undefined; ending = this.#flights.ending(hash)) await ending
    signal.throwIfAborted()
    const cached = cache.lookup(hash)
    const hit = cached?.state === 'ready'
    const joined = this.#flights.has(hash)
    if (hit || joined) counters.encoderCacheHits++
    if (hit) cache.ref(cached)
    const itemOf = (entry: FeatureEntry): EncodedItem => ({ item, hash, entry, numTokens: entry.numTokens, grid: entry.grid ?? [], cached: hit || joined })
    const placed = (entry: FeatureEntry): void => { request.progress?.placed(itemOf(entry), index) }
    const entry = hit
      ? cached
      : await this.#flights.join(hash, signal, {
        work: flightSignal => this.#produce({ hash, bytes, settings: item.settings, context: request.context, placed }, flightSignal),
        hold: made => cache.ref(made),
        done: made => cache.unref(made)
      })
    request.progress?.encoded(index)
    return itemOf(entry)
  }

  /** Makes a new entry. It comes back with one reference, the flight's own. */
  async #produce ({ hash, bytes, settings, context, placed }: Order, signal: AbortSignal): Promise<FeatureEntry> {
    const { cache } = this.#options
    const leave = await this.#places.enter(signal)
    try {
      const prepared = await this.#prepare.prepare(bytes, settings, context, signal)
      const entry = await this.#reserve(hash, prepared, signal)
      // Held while it is written: a clear() in between must not free blocks under the session worker's hands.
      cache.ref(entry)
      try {
        placed(entry)
        await this.#encode.encode(prepared, entry, context, signal)
        cache.commit(entry)
        return entry
      } catch (err) {
        cache.abandon(entry)
        cache.unref(entry)
        throw err
      }
    } finally {
      leave()
    }
  }

  /** Room for an item. Where features of the same hash are just being pulled in, ours lie beside them under a key of their own. */
  async #reserve (hash: string, prepared: PreparedItem, signal: AbortSignal): Promise<FeatureEntry> {
    const { cache, roomTimeoutMs = DEFAULT_ROOM_TIMEOUT_MS } = this.#options
    const meta = { numTokens: prepared.numTokens, grid: prepared.grid }
    const take = (key: string): Promise<FeatureEntry> => cache.reserveOrWait(key, featureBlocksFor(prepared.numTokens), meta, { signal, timeoutMs: roomTimeoutMs })
    const aside = `${hash}#${++this.#asides}`
    if (cache.lookup(hash) !== undefined) return await take(aside)
    return await take(hash).catch(err => {
      if (signal.aborted || err instanceof CacheError) throw err
      return take(aside)
    })
  }

  /** Ends the workers; what still waits is rejected. Idempotent. */
  async close (): Promise<void> {
    await Promise.all([this.#prepare.close(), this.#encode.close(), this.#loader.close()])
  }
}
