import type { FeatureCache, FeatureEntry } from '../../cache/feature-cache.ts'
import { CacheError } from '../../cache/room-queue.ts'
import { abortable, deferred } from '../../service/waiting.ts'
import type { RemoteMedia, SequenceMedia } from '../sequence/prompt.ts'
import { BlockLink, NOTHING_FETCHED, type BlockLinkOptions, type FetchCall, type Fetched } from './block-link.ts'
import type { FeatureSource } from './feature-migration.ts'

export interface FetcherOptions extends BlockLinkOptions {
  readonly features: FeatureCache
  /** Bytes of one row of features. */
  readonly rowBytes: number
  /** Rows of a feature block. */
  readonly blockTokens: number
  /** How long to wait for feature blocks, milliseconds. */
  readonly roomTimeoutMs: number
}

interface Pull { readonly kind: 'pull', readonly media: RemoteMedia, readonly entry: FeatureEntry, readonly settle: () => void }

/** How an item gets its features: they are `cached`, its own `pull` brings them into `entry`, or it waits for the pull of `another` item. */
export type Reservation =
  | { readonly kind: 'cached', readonly media: RemoteMedia }
  | Pull
  | { readonly kind: 'another', readonly pull: Promise<undefined> }

/**
 * Pulls features of other engines into the local feature cache. A content hash that is cached or being pulled is not
 * pulled again; the lease is ACKed all the same, so that the encoder can free its copy.
 */
export class FeatureFetcher implements FeatureSource<Reservation> {
  readonly #options: FetcherOptions
  readonly #link: BlockLink
  /** Content hash -> end of the pull that fills it; never rejects. */
  readonly #pulls = new Map<string, Promise<undefined>>()
  /** Entries that were pulled ahead of the sequence that they are for, until one finds them. */
  readonly #ahead = new WeakSet<FeatureEntry>()
  #privateKeys = 0

  constructor (options: FetcherOptions) {
    this.#options = options
    this.#link = new BlockLink('feature', options)
  }

  /** Finds the item, or reserves blocks for it if there is room. From here on the item holds its entry. */
  tryReserve (media: RemoteMedia): Reservation | undefined {
    const { features } = this.#options
    const found = features.lookup(media.contentHash)
    if (found?.state === 'ready' && found.numTokens === media.numTokens) {
      this.#hold(media, found)
      return { kind: 'cached', media }
    }
    const pull = this.#pulls.get(media.contentHash)
    if (pull !== undefined) return { kind: 'another', pull }
    // An unusable entry, which this engine's own encoder is filling, or of another length: pull into a private one beside it.
    const key = found === undefined ? media.contentHash : `${media.contentHash}#${++this.#privateKeys}`
    const entry = features.reserve(key, this.#blocksOf(media), { numTokens: media.numTokens, grid: media.grid })
    return entry === undefined ? undefined : this.#startPull(media, entry)
  }

  async reserve (media: RemoteMedia, signal: AbortSignal): Promise<Reservation> {
    for (;;) {
      signal.throwIfAborted()
      const reservation = this.tryReserve(media)
      if (reservation !== undefined) return reservation
      await this.#options.features.waitForRoom(this.#blocksOf(media), { signal, timeoutMs: this.#options.roomTimeoutMs })
    }
  }

  #blocksOf ({ numTokens }: RemoteMedia): number {
    return Math.ceil(numTokens / this.#options.blockTokens)
  }

  #startPull (media: RemoteMedia, entry: FeatureEntry): Reservation {
    this.#hold(media, entry)
    const { promise, resolve } = deferred<undefined>()
    this.#pulls.set(entry.hash, promise)
    const settle = (): void => {
      this.#pulls.delete(entry.hash)
      resolve(undefined)
    }
    return { kind: 'pull', media, entry, settle }
  }

  /** The item keeps one reference until its sequence has ended. */
  #hold (media: SequenceMedia, entry: FeatureEntry): void {
    this.#options.features.ref(entry)
    media.features = entry
  }

  /** Its item holds nothing any more, and an entry that no pull will fill is gone. */
  cancel (reservation: Reservation): void {
    if (reservation.kind === 'another') return
    const { features } = this.#options
    const { media } = reservation
    if (reservation.kind === 'pull') {
      features.abandon(reservation.entry)
      reservation.settle()
    }
    if (media.features !== undefined) features.unref(media.features)
    media.features = undefined
  }

  /** Rejects with what the pull failed with, or with the signal's reason. */
  async fetch (media: RemoteMedia, reservation: Reservation, call: FetchCall): Promise<Fetched> {
    if (reservation.kind === 'another') {
      await abortable(reservation.pull, call.signal)
      // Usually the features are cached now; if that pull failed, this item makes its own.
      return await this.fetch(media, await this.reserve(media, call.signal), call)
    }
    const fetched = reservation.kind === 'pull' ? await this.#pullInTurn(media, reservation, call) : this.#found(media)
    this.#link.ack(media.source, call.context)
    return fetched
  }

  async #pullInTurn (media: RemoteMedia, { entry, settle }: Pull, call: FetchCall): Promise<Fetched> {
    return await this.#pull(entry, settle, async () => await this.#link.inTurn(call.signal, async () => await this.#transfer(media, entry, call)))
  }

  #found ({ features }: RemoteMedia): Fetched {
    if (features === undefined || !this.#ahead.delete(features)) return NOTHING_FETCHED
    this.#options.counters.ahead.used++
    return { ...NOTHING_FETCHED, ahead: true }
  }

  /**
   * Brings features into the cache ahead of the sequence that they are for, and holds nothing once it has settled. Its pull
   * takes no turn, because it may wait until the encoder has filled the blocks. Undefined when nothing is to do: the features
   * are there, or on their way. Rejects also when there is no room just now.
   */
  async pullAhead (media: RemoteMedia, call: FetchCall): Promise<Fetched | undefined> {
    call.signal.throwIfAborted()
    const reservation = this.tryReserve(media)
    if (reservation === undefined) throw new CacheError('BUSY', 'no room for features ahead of their request')
    const { features } = media
    try {
      if (reservation.kind !== 'pull') return undefined
      const { entry, settle } = reservation
      this.#ahead.add(entry)
      return await this.#pull(entry, settle, async () => await this.#transfer(media, entry, call))
    } finally {
      if (features !== undefined) this.#options.features.unref(features)
    }
  }

  async #pull (entry: FeatureEntry, settle: () => void, pull: () => Promise<Fetched>): Promise<Fetched> {
    const { features } = this.#options
    try {
      const fetched = await pull()
      features.commit(entry)
      return fetched
    } catch (err) {
      features.abandon(entry)
      throw err
    } finally {
      settle()
    }
  }

  #transfer (media: RemoteMedia, entry: FeatureEntry, call: FetchCall): Promise<Fetched> {
    return this.#link.pull(media.source, entry.blocks, media.numTokens * this.#options.rowBytes, call)
  }

  /** Resolves when the ACKs under way have been answered. */
  async settled (): Promise<void> {
    await this.#link.settled()
  }
}
