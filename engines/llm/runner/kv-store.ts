import { copyElements, elementsOver, type Elements } from './elements.ts'
import { kvBlockElements, type RunnerShape } from './shape.ts'

/**
 * Keys and values in paged blocks; copies them to and from the dense `[rows, heads, length, dim]` tensors of the graphs.
 * Tensor `2 * layer` holds keys, `2 * layer + 1` values.
 */
export class KvStore {
  readonly #pool: Elements
  readonly #shape: RunnerShape
  readonly #blockElements: number
  /** Elements of one head in one block. */
  readonly #headElements: number
  readonly tensors: number

  constructor (shape: RunnerShape, sab: SharedArrayBuffer) {
    this.#shape = shape
    this.#pool = elementsOver(shape.dtype, sab)
    this.#blockElements = kvBlockElements(shape)
    this.#headElements = shape.blockTokens * shape.headDim
    this.tensors = 2 * shape.layers
  }

  /** Where head `head` of tensor `t` begins in `block`. */
  #at (block: number, t: number, head: number): number {
    return block * this.#blockElements + (t * this.#shape.kvHeads + head) * this.#headElements
  }

  /** Copies the first `length` tokens in `blocks` to row `row` of dense tensors with room for `capacity` tokens a row. */
  gather (into: readonly Elements[], row: number, capacity: number, blocks: readonly number[], length: number): void {
    const { kvHeads, headDim } = this.#shape
    for (let t = 0; t < this.tensors; t++) {
      const tensor = into[t] as Elements
      for (let head = 0; head < kvHeads; head++) {
        let to = (row * kvHeads + head) * capacity * headDim
        let left = length * headDim
        for (let b = 0; left > 0; b++) {
          const from = this.#at(blocks[b] as number, t, head)
          const count = Math.min(left, this.#headElements)
          tensor.set(this.#pool.subarray(from, from + count), to)
          to += count
          left -= count
        }
      }
    }
  }

  /**
   * Writes tokens `[start, start + count)` of a sequence from row `row` of tensor `t`, a dense tensor of `length` tokens
   * a row in which they begin at token `offset`.
   */
  scatter (from: Elements, t: number, row: number, length: number, offset: number, blocks: readonly number[], start: number, count: number): void {
    const { kvHeads, headDim, blockTokens } = this.#shape
    for (let head = 0; head < kvHeads; head++) {
      const base = ((row * kvHeads + head) * length + offset) * headDim
      for (let done = 0; done < count;) {
        const index = start + done
        const inBlock = index % blockTokens
        const n = Math.min(count - done, blockTokens - inBlock)
        const to = this.#at(blocks[Math.floor(index / blockTokens)] as number, t, head) + inBlock * headDim
        this.#pool.set(from.subarray(base + done * headDim, base + (done + n) * headDim), to)
        done += n
      }
    }
  }

  /** Like `scatter` for one token, without making views: a decode step does this for every row and layer. */
  scatterToken (from: Elements, at: number, headStride: number, t: number, block: number, inBlock: number): void {
    const { kvHeads, headDim } = this.#shape
    for (let head = 0; head < kvHeads; head++) {
      copyElements(from, at + head * headStride, this.#pool, this.#at(block, t, head) + inBlock * headDim, headDim)
    }
  }
}
