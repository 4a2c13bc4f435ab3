import type { FeatureCache } from '../cache/feature-cache.ts'
import { abortable } from '../service/waiting.ts'
import { BlockLink, NOTHING_FETCHED, type BlockLinkOptions, type FetchCall, type Fetched } from '../llm/migration/block-link.ts'
import type { FeatureSource } from '../llm/migration/feature-migration.ts'
import { bytesOf, type Elements, type ElementType } from '../llm/runner/elements.ts'
import type { RemoteBlocks, RemoteMedia } from '../llm/sequence/prompt.ts'
import { featureBlocksFor } from '../models/family.ts'
import { copyToTensor, type EmbeddingTable } from './input-embeddings.ts'

export interface FeatureShimOptions extends BlockLinkOptions {
  /** Blocks that pulls write to; an item holds its own only until it is copied out. */
  readonly staging: FeatureCache
  readonly embeddings: EmbeddingTable
  readonly hiddenSize: number
  readonly dtype: ElementType
  /** How long an item waits for staging blocks, milliseconds. */
  readonly roomTimeoutMs: number
}

/**
 * Adapts the P2P link to an engine without feature blocks: pulls an encoder's features into staging blocks, copies them
 * to a plain tensor, frees the blocks and ACKs. An item waits for nothing while it holds blocks, so there is nothing to
 * reserve beforehand. The choices of one request share the tensor of a lease.
 */
export class FeatureShim implements FeatureSource<'staged'> {
  readonly #options: FeatureShimOptions
  readonly #link: BlockLink
  /** Tensors, pulled or being pulled, by their source: one object for all choices of a request. */
  readonly #tensors = new WeakMap<RemoteBlocks, Promise<Elements>>()
  #pulls = 0

  constructor (options: FeatureShimOptions) {
    this.#options = options
    this.#link = new BlockLink('feature', options)
  }

  tryReserve (): 'staged' {
    return 'staged'
  }

  async reserve (): Promise<'staged'> {
    return 'staged'
  }

  cancel (): void {}

  async fetch (media: RemoteMedia, _reservation: 'staged', call: FetchCall): Promise<Fetched> {
    for (;;) {
      call.signal.throwIfAborted()
      const shared = this.#tensors.get(media.source)
      if (shared === undefined) return await this.#fetchOwn(media, call)
      // When another choice's pull fails or is cancelled, this one makes its own.
      const tensor = await abortable(shared, call.signal).catch(() => undefined)
      if (tensor === undefined) continue
      this.#options.embeddings.put(media, tensor)
      return NOTHING_FETCHED
    }
  }

  async #fetchOwn (media: RemoteMedia, call: FetchCall): Promise<Fetched> {
    const pull = this.#link.inTurn(call.signal, async () => await this.#pull(media, call))
    const tensor = pull.then(pulled => pulled.tensor)
    this.#tensors.set(media.source, tensor)
    tensor.catch(() => { this.#tensors.delete(media.source) })
    const { fetched } = await pull
    this.#options.embeddings.put(media, await tensor)
    this.#link.ack(media.source, call.context)
    return fetched
  }

  /** One item from the encoder's blocks to a tensor. When it has settled the staging blocks are free again. */
  async #pull (media: RemoteMedia, call: FetchCall): Promise<{ tensor: Elements, fetched: Fetched }> {
    const { staging, hiddenSize, dtype, roomTimeoutMs } = this.#options
    const { numTokens } = media
    const entry = await staging.reserveOrWait(`pull#${++this.#pulls}`, featureBlocksFor(numTokens), { numTokens }, { signal: call.signal, timeoutMs: roomTimeoutMs })
    try {
      const fetched = await this.#link.pull(media.source, entry.blocks, numTokens * hiddenSize * bytesOf(dtype), call)
      return { tensor: copyToTensor(staging.pool, entry.blocks, numTokens, hiddenSize, dtype), fetched }
    } finally {
      staging.abandon(entry)
    }
  }

  async settled (): Promise<void> {
    await this.#link.settled()
  }
}
