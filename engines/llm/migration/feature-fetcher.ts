import type { FeatureCache, FeatureEntry } from '../../cache/feature-cache.ts'
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

/** How an item gets its features: they are `cached`, its own `pull` brings them into `entry`, or it waits for the pull of `another` item. */
export type Reservation =
  | { readonly kind: 'cached', readonly media: RemoteMedia }
  | { readonly kind: 'pull', readonly media: RemoteMedia, readonly entry: FeatureEntry, readonly settle: () => void }
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
    const fetched = reservation.kind === 'pull' ? await this.#pull(media, reservation.entry, reservation.settle, call) : NOTHING_FETCHED
    this.#link.ack(media.source, call.context)
    return fetched
  }

  async #pull (media: RemoteMedia, entry: FeatureEntry, settle: () => void, call: FetchCall): Promise<Fetched> {
    const { features, rowBytes } = this.#options
    try {
      const fetched = await this.#link.inTurn(call.signal, async () => await this.#link.pull(media.source, entry.blocks, media.numTokens * rowBytes, call))
      features.commit(entry)
      return fetched
    } catch (err) {
      features.abandon(entry)
      throw err
    } finally {
      settle()
    }
  }

  /** Resolves when the ACKs under way have been answered. */
  async settled (): Promise<void> {
    await this.#link.settled()
  }
}
