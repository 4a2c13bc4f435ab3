import type { BlockPool } from '../cache/block-pool.ts'
import { bytesOf, elementsOver, type Elements, type ElementType } from '../llm/runner/elements.ts'
import type { FeatureRows } from '../llm/runner/prefill.ts'
import type { SequenceMedia } from '../llm/sequence/prompt.ts'
import type { PrefillChunk, Sequence } from '../llm/sequence/sequence.ts'

/**
 * Media of a prompt in the form that LMDeploy's TurboMind takes from Python (`async_stream_infer`): `input_embeddings[i]`, a
 * tensor of [end - begin, hidden], replaces the embeddings of tokens `[begin, end)` = `input_embedding_ranges[i]`.
 */
export interface InputEmbeddings {
  readonly input_embeddings: readonly Elements[]
  readonly input_embedding_ranges: ReadonlyArray<readonly [begin: number, end: number]>
}

/** A plain tensor of `rows` rows, in shared memory so that the session worker need not get a copy with every chunk. */
export function newTensor (rows: number, hiddenSize: number, dtype: ElementType): Elements {
  return elementsOver(dtype, new SharedArrayBuffer(rows * hiddenSize * bytesOf(dtype)))
}

/** Copies the `rows` rows that begin in `blocks` of a feature pool to a plain tensor. */
export function copyToTensor (pool: BlockPool, blocks: readonly number[], rows: number, hiddenSize: number, dtype: ElementType): Elements {
  const tensor = newTensor(rows, hiddenSize, dtype)
  const bytes = new Uint8Array(tensor.buffer, tensor.byteOffset, tensor.byteLength)
  for (let at = 0, b = 0; at < bytes.length; at += pool.blockBytes, b++) {
    bytes.set(pool.bytes(blocks[b] as number).subarray(0, bytes.length - at), at)
  }
  return tensor
}

/** The tensors of live sequences: the shim puts them in, the engine reads them by token ranges. */
export class EmbeddingTable {
  readonly #hiddenSize: number
  /** Weak: a tensor is freed with its sequence. */
  readonly #tensors = new WeakMap<SequenceMedia, Elements>()
  readonly #inputs = new WeakMap<Sequence, InputEmbeddings>()

  constructor (hiddenSize: number) {
    this.#hiddenSize = hiddenSize
  }

  /** `tensor`: [media.numTokens, hidden]. */
  put (media: SequenceMedia, tensor: Elements): void {
    if (tensor.length !== media.numTokens * this.#hiddenSize) throw new RangeError(`${media.numTokens} tokens take ${media.numTokens * this.#hiddenSize} numbers, not ${tensor.length}`)
    this.#tensors.set(media, tensor)
  }

  /** The arguments that TurboMind would get. @throws when a tensor is missing. */
  inputsOf (sequence: Sequence): InputEmbeddings {
    let inputs = this.#inputs.get(sequence)
    if (inputs === undefined) this.#inputs.set(sequence, inputs = this.#build(sequence))
    return inputs
  }

  #build ({ id, spans, media }: Sequence): InputEmbeddings {
    const tensors = spans.map(({ item, offset, length }) => {
      const tensor = this.#tensors.get(media[item] as SequenceMedia)
      if (tensor === undefined) throw new Error(`sequence ${id}: the embeddings of item ${item} are not here`)
      return tensor.subarray(offset * this.#hiddenSize, (offset + length) * this.#hiddenSize)
    })
    return { input_embeddings: tensors, input_embedding_ranges: spans.map(({ start, length }) => [start, start + length]) }
  }

  /** The parts of the ranges that fall into a chunk. */
  featuresOf ({ sequence, start, count }: PrefillChunk): FeatureRows[] {
    if (sequence.spans.length === 0) return []
    const { input_embeddings: tensors, input_embedding_ranges: ranges } = this.inputsOf(sequence)
    return ranges.flatMap(([begin, end], i) => {
      const from = Math.max(begin, start)
      const rows = Math.min(end, start + count) - from
      return rows > 0 ? [{ at: from - start, rows, offset: from - begin, tensor: tensors[i] as Elements }] : []
    })
  }
}
