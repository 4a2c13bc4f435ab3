import { LlmEngine, type LlmEngineOptions } from '../llm/engine.ts'
import type { ElementType } from '../llm/runner/elements.ts'
import type { Sequence, SequenceInit } from '../llm/sequence/sequence.ts'
import { newTensor, type EmbeddingTable } from './input-embeddings.ts'
import { copyOut } from './shim/copy-out.ts'

export interface TurbomindEngineOptions extends LlmEngineOptions {
  readonly embeddings: EmbeddingTable
  readonly hiddenSize: number
  readonly dtype: ElementType
}

/**
 * The loops of the PyTorch-like engine over a persistent batch of slots. It holds no feature blocks: what this engine's
 * own vision encoder made is copied to a plain tensor before the sequence starts, as LMDeploy's ImageEncoder hands
 * features to TurboMind.
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
      const tensor = newTensor(media.numTokens, hiddenSize, dtype)
      copyOut(features.pool, media.features.blocks, tensor)
      embeddings.put(media, tensor)
      features.unref(media.features)
      media.features = undefined
    }
    return super.submit(init)
  }
}
