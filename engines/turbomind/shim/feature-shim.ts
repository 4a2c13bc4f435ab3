import type { FeatureCache } from '../../cache/feature-cache.ts'
import { abortable } from '../../service/waiting.ts'
import { BlockLink, NOTHING_FETCHED, type BlockLinkOptions, type FetchCall, type Fetched } from '../../llm/migration/block-link.ts'
import type { FeatureSource, RemoteMedia } from '../../llm/migration/feature-source.ts'
import { bytesOf, type Elements, type ElementType } from '../../llm/runner/elements.ts'
import { featureBlocksFor } from '../../models/family.ts'
import { newTensor, type EmbeddingTable } from '../input-embeddings.ts'
import { copyOut } from './copy-out.ts'
import type { EncoderResultEntry } from '../../llm/sequence/remote.ts'

export interface FeatureShimOptions extends BlockLinkOptions {
  /** Blocks where pulls land; an item holds its own only while it is pulled and copied out. */
  readonly staging: FeatureCache
  readonly embeddings: EmbeddingTable
  readonly hiddenSize: number
  readonly dtype: ElementType
  /** How long an item waits for staging blocks, milliseconds. */
  readonly roomTimeoutMs: number
}

/**
 * What stands between the P2P link and an engine that knows no feature blocks: pulls an encoder's features into staging
 * blocks, copies them out to a plain tensor, gives the blocks back and ACKs. An item waits for nothing while it holds
 * blocks, so there is nothing to claim beforehand. Choices of one request share the tensor of a lease.
 */
export class FeatureShim implements FeatureSource<undefined> {
  readonly #options: FeatureShimOptions
  readonly #link: BlockLink
  /** Tensors, here or on their way, by the result that names them: one object for all choices of a request. */
  readonly #tensors = new WeakMap<EncoderResultEntry, Promise<Elements>>()
  #landings = 0

  constructor (options: FeatureShimOptions) {
    this.#options = options
    this.#link = new BlockLink('feature', options)
  }

  async claim (_media: RemoteMedia, signal: AbortSignal): Promise<undefined> {
    signal.throwIfAborted()
  }

  drop (): void {}

  async fetch (media: RemoteMedia, _claim: undefined, call: FetchCall): Promise<Fetched> {
    for (;;) {
      call.signal.throwIfAborted()
      const shared = this.#tensors.get(media.source)
      if (shared === undefined) return await this.#fetchOwn(media, call)
      // When a sibling's pull fails or is given up, this one finds out for itself.
      const tensor = await abortable(shared, call.signal).catch(() => undefined)
      if (tensor === undefined) continue
      this.#options.embeddings.put(media, tensor)
      return NOTHING_FETCHED
    }
  }

  async #fetchOwn (media: RemoteMedia, call: FetchCall): Promise<Fetched> {
    const landing = this.#land(media, call)
    const tensor = landing.then(landed => landed.tensor)
    this.#tensors.set(media.source, tensor)
    tensor.catch(() => { this.#tensors.delete(media.source) })
    const { fetched } = await landing
    this.#options.embeddings.put(media, await tensor)
    this.#link.ack(media.source, call.context)
    return fetched
  }

  /** One item from E's blocks to a tensor of ours. When it has settled the staging blocks are free again. */
  async #land (media: RemoteMedia, call: FetchCall): Promise<{ tensor: Elements, fetched: Fetched }> {
    const { staging, hiddenSize, dtype, roomTimeoutMs } = this.#options
    const { numTokens } = media
    const entry = await staging.reserveOrWait(`landing#${++this.#landings}`, featureBlocksFor(numTokens), { numTokens }, { signal: call.signal, timeoutMs: roomTimeoutMs })
    try {
      const fetched = await this.#link.pull(media.source, entry.blocks, numTokens * hiddenSize * bytesOf(dtype), call)
      const tensor = newTensor(numTokens, hiddenSize, dtype)
      copyOut(staging.pool, entry.blocks, tensor)
      return { tensor, fetched }
    } finally {
      staging.abandon(entry)
    }
  }

  async settled (): Promise<void> {
    await this.#link.settled()
  }
}
