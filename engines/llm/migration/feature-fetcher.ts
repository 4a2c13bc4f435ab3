import type { FeatureCache, FeatureEntry } from '../../cache/feature-cache.ts'
import { abortable } from '../../service/waiting.ts'
import { BlockLink, NOTHING_FETCHED, type BlockLinkOptions, type FetchCall, type Fetched } from './block-link.ts'
import type { FeatureSource, RemoteMedia } from './feature-source.ts'
import type { SequenceMedia } from '../sequence/sequence.ts'

export interface FetcherOptions extends BlockLinkOptions {
  readonly features: FeatureCache
  /** Bytes of one row of features. */
  readonly rowBytes: number
  /** Rows of a feature block. */
  readonly blockTokens: number
  /** How long to wait for feature blocks, milliseconds. */
  readonly roomTimeoutMs: number
}

/** How an item will get its features: they are `here`, its `own` pull brings them, or it waits for `another` one's. */
export type Claim =
  | { readonly kind: 'here' }
  | { readonly kind: 'own', readonly entry: FeatureEntry, readonly landed: () => void }
  | { readonly kind: 'another', readonly pull: Promise<void> }

/**
 * Brings features of other engines into the local feature cache. A content hash that is here already, or on its way,
 * is not pulled again; the lease is ACKed all the same, which is what frees the encoder's copy.
 */
export class FeatureFetcher implements FeatureSource<Claim> {
  readonly #options: FetcherOptions
  readonly #link: BlockLink
  /** Content hash -> end of the pull that fills it; never rejects. */
  readonly #pulls = new Map<string, Promise<void>>()
  #privateKeys = 0

  constructor (options: FetcherOptions) {
    this.#options = options
    this.#link = new BlockLink('feature', options)
  }

  /** Finds the item, or reserves blocks for it, waiting for room. From here on the item holds its entry. */
  async claim (media: RemoteMedia, signal: AbortSignal): Promise<Claim> {
    const { features, roomTimeoutMs } = this.#options
    const blocks = this.#blocksOf(media)
    for (;;) {
      signal.throwIfAborted()
      const found = features.lookup(media.contentHash)
      if (found?.state === 'ready' && found.numTokens === media.numTokens) {
        this.#hold(media, found)
        return { kind: 'here' }
      }
      const pull = this.#pulls.get(media.contentHash)
      if (pull !== undefined) return { kind: 'another', pull }
      // Found but of no use: this engine's own encoder fills it at this moment, or it is of another length. Pull beside it.
      const key = found === undefined ? media.contentHash : `${media.contentHash}#${++this.#privateKeys}`
      const entry = features.reserve(key, blocks, { numTokens: media.numTokens, grid: media.source.grid })
      if (entry !== undefined) return this.#own(media, entry)
      await features.waitForRoom(blocks, { signal, timeoutMs: roomTimeoutMs })
    }
  }

  #own (media: RemoteMedia, entry: FeatureEntry): Claim {
    this.#hold(media, entry)
    let resolve = (): void => {}
    const pull = new Promise<void>(_resolve => { resolve = _resolve })
    this.#pulls.set(entry.hash, pull)
    const landed = (): void => {
      this.#pulls.delete(entry.hash)
      resolve()
    }
    return { kind: 'own', entry, landed }
  }

  /** The item keeps one reference until its sequence has ended. */
  #hold (media: SequenceMedia, entry: FeatureEntry): void {
    this.#options.features.ref(entry)
    media.features = entry
  }

  #blocksOf (media: SequenceMedia): number {
    return Math.ceil(media.numTokens / this.#options.blockTokens)
  }

  /** Gives up a claim that was not carried out: nobody may find blocks that were never filled. */
  drop (claim: Claim): void {
    if (claim.kind !== 'own') return
    this.#options.features.abandon(claim.entry)
    claim.landed()
  }

  /** Carries out a claim and ACKs the lease. Rejects with what the pull failed with, or with the signal's reason. */
  async fetch (media: RemoteMedia, claim: Claim, call: FetchCall): Promise<Fetched> {
    if (claim.kind === 'another') {
      await abortable(claim.pull, call.signal)
      // Usually it is here now; if that pull failed, this item makes its own.
      return await this.fetch(media, await this.claim(media, call.signal), call)
    }
    const fetched = claim.kind === 'own' ? await this.#pull(media, claim.entry, claim.landed, call) : NOTHING_FETCHED
    this.#link.ack(media.source, call.context)
    return fetched
  }

  async #pull (media: RemoteMedia, entry: FeatureEntry, landed: () => void, call: FetchCall): Promise<Fetched> {
    const { features, rowBytes } = this.#options
    try {
      const fetched = await this.#link.pull(media.source, entry.blocks, media.numTokens * rowBytes, call)
      features.commit(entry)
      return fetched
    } catch (err) {
      features.abandon(entry)
      throw err
    } finally {
      landed()
    }
  }

  /** Resolves when the ACKs under way have been answered. */
  async settled (): Promise<void> {
    await this.#link.settled()
  }
}
