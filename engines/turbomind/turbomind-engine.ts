import { LlmEngine, type LlmEngineOptions } from '../llm/engine.ts'
import type { FeatureEntry } from '../cache/feature-cache.ts'
import type { Elements, ElementType } from '../llm/runner/elements.ts'
import type { Sequence, SequenceInit } from '../llm/sequence/sequence.ts'
import { copyToTensor, type EmbeddingTable } from './input-embeddings.ts'

export interface TurbomindEngineOptions extends LlmEngineOptions {
  readonly embeddings: EmbeddingTable
  readonly hiddenSize: number
  readonly dtype: ElementType
}

/**
 * The loops of the PyTorch-like engine over a persistent batch of slots. It holds no feature blocks: the output of its own
 * vision encoder is copied to a plain tensor before the sequence starts, as LMDeploy's ImageEncoder does for TurboMind.
 */
export class TurbomindEngine extends LlmEngine {
  readonly #own: TurbomindEngineOptions
  /** Of this engine's own features: the choices of a request, and requests that overlap, share one tensor. Weak, so that it lasts as long as they do. */
  readonly #tensors = new WeakMap<FeatureEntry, WeakRef<Elements>>()

  constructor (options: TurbomindEngineOptions) {
    super(options)
    this.#own = options
  }

  override submit (init: SequenceInit): Sequence {
    const { features, embeddings } = this.#own
    for (const media of init.media) {
      if (media.features === undefined) continue
      embeddings.put(media, this.#tensorOf(media.features))
      features.unref(media.features)
      media.features = undefined
    }
    return super.submit(init)
  }

  #tensorOf (entry: FeatureEntry): Elements {
    const { features, hiddenSize, dtype } = this.#own
    const made = this.#tensors.get(entry)?.deref()
    if (made !== undefined) return made
    const tensor = copyToTensor(features.pool, entry.blocks, entry.numTokens, hiddenSize, dtype)
    this.#tensors.set(entry, new WeakRef(tensor))
    return tensor
  }
}
