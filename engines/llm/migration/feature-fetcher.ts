import type { FeatureCache, FeatureEntry } from '../../cache/feature-cache.ts'
import { CacheError } from '../../cache/room-queue.ts'
import { Semaphore } from '../../service/waiting.ts'
import { WriteGate } from '../../p2p/write-gate.ts'
import type { RemoteMedia } from '../sequence/prompt.ts'
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

/** An entry that is being filled. Who is first in line pulls; when that fails the next in line does, into the same blocks. */
interface Filling {
  readonly entry: FeatureEntry
  readonly line: Semaphore
  users: number
  filled: boolean
  /** Set by a pull ahead: ends it when nothing has arrived yet, so that no request waits for an encoder that may never fill its offer. */
  giveWay?: () => void
}

/** The item holds its entry, which is cached, or which it or another item of its `filling` will fill. */
export interface Reservation { readonly media: RemoteMedia, readonly filling: Filling | undefined }

/**
 * Pulls features of other engines into the local feature cache. A content hash that is cached or being pulled is not
 * pulled again; the lease is ACKed all the same, so that the encoder can free its copy.
 */
export class FeatureFetcher implements FeatureSource<Reservation> {
  readonly #options: FetcherOptions
  readonly #link: BlockLink
  readonly #fillings = new WeakMap<FeatureEntry, Filling>()
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
    if (found?.numTokens === media.numTokens) {
      const filling = this.#fillings.get(found)
      if (found.state === 'ready' || filling !== undefined) return this.#hold(media, found, filling)
    }
    // An unusable entry, which this engine's own encoder is filling, or of another length: pull into a private one beside it.
    const key = found === undefined ? media.contentHash : `${media.contentHash}#${++this.#privateKeys}`
    const entry = features.reserve(key, this.#blocksOf(media), { numTokens: media.numTokens, grid: media.grid })
    if (entry === undefined) return undefined
    const filling: Filling = { entry, line: new Semaphore(1), users: 0, filled: false }
    this.#fillings.set(entry, filling)
    return this.#hold(media, entry, filling)
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

  /** The item keeps one reference until its sequence has ended. */
  #hold (media: RemoteMedia, entry: FeatureEntry, filling: Filling | undefined): Reservation {
    this.#options.features.ref(entry)
    media.features = entry
    if (filling !== undefined) filling.users++
    return { media, filling }
  }

  /** An entry that nobody is left to fill is gone. */
  #leave (filling: Filling): void {
    filling.users--
    if (filling.users === 0 && !filling.filled) this.#options.features.abandon(filling.entry)
  }

  /** Its item holds nothing any more. */
  cancel ({ media, filling }: Reservation): void {
    if (filling !== undefined) this.#leave(filling)
    if (media.features !== undefined) this.#options.features.unref(media.features)
    media.features = undefined
  }

  /** Rejects with what the pull failed with, or with the signal's reason. */
  async fetch (media: RemoteMedia, { filling }: Reservation, call: FetchCall): Promise<Fetched> {
    const { signal } = call
    filling?.giveWay?.()
    const pulled = filling && await this.#fill(filling, signal, async () => await this.#link.inTurn(signal, async () => await this.#transfer(media, filling.entry, call)))
    const fetched = pulled ?? this.#found(media)
    this.#link.ack(media.source, call.context)
    return fetched
  }

  /** Waits in line, and pulls unless one before it has: undefined then. */
  async #fill (filling: Filling, signal: AbortSignal, pull: () => Promise<Fetched>): Promise<Fetched | undefined> {
    try {
      const next = await filling.line.enter(signal)
      try {
        if (filling.filled) return undefined
        const fetched = await pull()
        filling.filled = true
        this.#options.features.commit(filling.entry)
        return fetched
      } finally {
        next()
      }
    } finally {
      this.#leave(filling)
    }
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
    const { filling } = reservation
    if (filling === undefined || filling.users > 1) {
      this.cancel(reservation)
      return undefined
    }
    const { entry } = filling
    const gate = new WriteGate()
    const stop = new AbortController()
    filling.giveWay = () => { if (!gate.begun) stop.abort(new Error('its request pulls it')) }
    const signal = AbortSignal.any([call.signal, stop.signal])
    try {
      return await this.#fill(filling, signal, async () => {
        const fetched = await this.#transfer(media, entry, { ...call, signal, gate })
        this.#ahead.add(entry)
        return fetched
      })
    } finally {
      delete filling.giveWay
      this.#options.features.unref(entry)
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
