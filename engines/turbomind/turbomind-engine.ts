import { LlmEngine, type LlmEngineOptions } from '../llm/engine.ts'
import type { ElementType } from '../llm/runner/elements.ts'
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

  constructor (options: TurbomindEngineOptions) {
    super(options)
    this.#own = options
  }

  override submit (init: SequenceInit): Sequence {
    const { features, embeddings, hiddenSize, dtype } = this.#own
    for (const media of init.media) {
      if (media.features === undefined) continue
      embeddings.put(media, copyToTensor(features.pool, media.features.blocks, media.numTokens, hiddenSize, dtype))
      features.unref(media.features)
      media.features = undefined
    }
    return super.submit(init)
  }
}
