import type { Session, TensorData } from '../../runtime/types.ts'
import type { DecoderGraph } from './decoder-graph.ts'
import { elementsOver, newElements, tensor, type Elements } from './elements.ts'
import type { KvStore } from './kv-store.ts'
import type { RunnerShape } from './shape.ts'

/** Tokens `[at, at + rows)` of a chunk are rows `[offset, offset + rows)` of the features in `blocks`, or of `tensor`. */
export type FeatureRows = {
  readonly at: number
  readonly rows: number
  readonly offset: number
} & ({ readonly blocks: readonly number[] } | { readonly tensor: Elements })

/** A chunk of one prompt. `blocks` hold the keys and values before it, and get its own. */
export interface PrefillRow {
  readonly tokens: Int32Array
  /** `positionAxes` rows of `tokens.length`. */
  readonly positions: Int32Array
  /** Prompt tokens before the chunk. */
  readonly start: number
  readonly blocks: readonly number[]
  readonly features: readonly FeatureRows[]
}

/** Overwrites embeddings of media tokens with features. */
export function overlayFeatures (embeds: Elements, row: number, length: number, features: readonly FeatureRows[], pool: Elements, shape: RunnerShape): void {
  const { hiddenSize, featureBlockTokens } = shape
  for (const piece of features) {
    const { at, rows, offset } = piece
    if ('tensor' in piece) {
      embeds.set(piece.tensor.subarray(offset * hiddenSize, (offset + rows) * hiddenSize), (row * length + at) * hiddenSize)
      continue
    }
    const { blocks } = piece
    for (let done = 0; done < rows;) {
      const index = offset + done
      const inBlock = index % featureBlockTokens
      const n = Math.min(rows - done, featureBlockTokens - inBlock)
      const from = ((blocks[Math.floor(index / featureBlockTokens)] as number) * featureBlockTokens + inBlock) * hiddenSize
      embeds.set(pool.subarray(from, from + n * hiddenSize), (row * length + at + done) * hiddenSize)
      done += n
    }
  }
}

/** Computes prompts: embeds tokens, overlays features, runs the decoder over all rows padded to the longest, writes keys and values to the blocks. */
export class Prefiller {
  readonly #shape: RunnerShape
  readonly #kv: KvStore
  readonly #features: Elements

  constructor (shape: RunnerShape, kv: KvStore, features: SharedArrayBuffer) {
    this.#shape = shape
    this.#kv = kv
    this.#features = elementsOver(shape.dtype, features)
  }

  async run (graph: DecoderGraph, embed: Session, rows: readonly PrefillRow[]): Promise<void> {
    const length = Math.max(...rows.map(row => row.tokens.length))
    const past = Math.max(...rows.map(row => row.start))
    const feeds: Record<string, TensorData> = {
      inputs_embeds: await this.#embed(embed, rows, length),
      attention_mask: this.#mask(rows, past, length),
      position_ids: this.#positionIds(rows, length)
    }
    this.#past(rows, past).forEach((data, t) => { feeds[graph.pastNames[t] as string] = data })
    const { added } = await graph.run(feeds, past, length, false)
    added.forEach(({ data, length: tokens, offset }, t) => {
      rows.forEach((row, r) => this.#kv.scatter(data, t, r, tokens, offset, row.blocks, row.start, row.tokens.length))
    })
  }

  async #embed (embed: Session, rows: readonly PrefillRow[], length: number): Promise<TensorData> {
    const ids = new BigInt64Array(rows.length * length)
    rows.forEach((row, r) => row.tokens.forEach((token, i) => { ids[r * length + i] = BigInt(token) }))
    const { inputs_embeds: embeds } = await embed.run({ input_ids: { type: 'int64', data: ids, dims: [rows.length, length] } })
    const out = embeds as TensorData
    rows.forEach((row, r) => overlayFeatures(out.data as Elements, r, length, row.features, this.#features, this.#shape))
    return out
  }

  /** Past columns in use, then the new tokens; the graph itself lets no token see later ones. */
  #mask (rows: readonly PrefillRow[], past: number, length: number): TensorData {
    const width = past + length
    const data = new BigInt64Array(rows.length * width)
    rows.forEach((row, r) => {
      data.fill(1n, r * width, r * width + row.start)
      data.fill(1n, r * width + past, r * width + past + row.tokens.length)
    })
    return { type: 'int64', data, dims: [rows.length, width] }
  }

  #positionIds (rows: readonly PrefillRow[], length: number): TensorData {
    const axes = this.#shape.positionAxes
    const data = new BigInt64Array(axes * rows.length * length)
    rows.forEach((row, r) => {
      const n = row.tokens.length
      for (let axis = 0; axis < axes; axis++) {
        for (let i = 0; i < n; i++) data[(axis * rows.length + r) * length + i] = BigInt(row.positions[axis * n + i] as number)
      }
    })
    return { type: 'int64', data, dims: axes === 1 ? [rows.length, length] : [axes, rows.length, length] }
  }

  #past (rows: readonly PrefillRow[], past: number): TensorData[] {
    const { kvHeads, headDim, dtype } = this.#shape
    const cells = rows.length * kvHeads * past * headDim
    const tensors = Array.from({ length: this.#kv.tensors }, () => newElements(dtype, cells))
    if (past > 0) rows.forEach((row, r) => this.#kv.gather(tensors, r, past, row.blocks, row.start))
    return tensors.map(data => tensor(dtype, data, [rows.length, kvHeads, past, headDim]))
  }
}
