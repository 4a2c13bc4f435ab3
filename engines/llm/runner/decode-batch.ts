import type { Session, TensorData } from '../../runtime/types.ts'
import { Sampler } from './sampler.ts'
import type { SamplingParams, SampledToken } from '../sequence/sampling.ts'
import type { DecoderGraph, NewTokens } from './decoder-graph.ts'
import { copyElements, floatRow, newElements, tensor, type Elements } from './elements.ts'
import type { KvStore } from './kv-store.ts'
import type { RunnerShape } from './shape.ts'

/** A sequence as it enters the batch. All its tokens but the last have their keys and values in `blocks`. */
export interface DecodeJoin {
  readonly id: number
  readonly tokens: Int32Array
  readonly promptLength: number
  readonly blocks: readonly number[]
  /** Position of the last token, per axis. */
  readonly positions: readonly number[]
  readonly sampling: SamplingParams
}

interface Row {
  readonly id: number
  readonly blocks: number[]
  readonly sampler: Sampler
  readonly positions: number[]
  /** Tokens in the past. */
  length: number
  lastToken: number
}

/** Spare columns when the past is gathered anew: each costs a little in every step, gathering costs much at once. */
const HEADROOM = 32
const ROUND = 16
/** With so many columns more than the longest row needs, the past is gathered anew. */
const MAX_SLACK = 128

/**
 * The rows of a decode step and their past, kept dense between steps. A step extends the past in place: graphs want
 * exact dimensions, so the past has a fixed number of columns with room to grow, and `attention_mask` leaves out those
 * not yet in use. Joining copies one row from the paged blocks, leaving moves the last row into the gap, and the whole
 * past is gathered again only when the columns run out.
 */
export class DecodeBatch {
  readonly #shape: RunnerShape
  readonly #kv: KvStore
  readonly #rows: Row[] = []
  readonly #rowOf = new Map<number, number>()
  #columns = 0
  #past: Elements[] = []
  #mask = new BigInt64Array(0)
  /** Milliseconds since the start. The rest of a step is onnxruntime, or negligible. */
  readonly timings = { compose: 0, extend: 0, sample: 0 }

  constructor (shape: RunnerShape, kv: KvStore) {
    this.#shape = shape
    this.#kv = kv
  }

  /** Makes the batch consist of `ids`: others leave, `joins` bring the new ones. */
  compose (ids: readonly number[], joins: readonly DecodeJoin[]): void {
    const begin = performance.now()
    const wanted = new Set(ids)
    // A sequence that joins while it has a row was evicted since; the old row is useless.
    for (const join of joins) wanted.delete(join.id)
    for (let row = this.#rows.length - 1; row >= 0; row--) if (!wanted.has((this.#rows[row] as Row).id)) this.#leave(row)
    const first = this.#rows.length
    for (const join of joins) this.#append(join)
    if (this.#rows.length !== ids.length || !ids.every(id => this.#rowOf.has(id))) throw new Error('a sequence is to be decoded that never joined')
    const longest = this.#rows.reduce((max, row) => Math.max(max, row.length), 0)
    if (longest > this.#columns || this.#columns - longest > MAX_SLACK || !this.#fits(this.#rows.length, this.#columns)) {
      this.#layOut(longest)
    } else {
      for (let row = first; row < this.#rows.length; row++) this.#fill(row)
    }
    this.timings.compose += performance.now() - begin
  }

  addBlock (id: number, block: number): void {
    this.#rows[this.#rowOf.get(id) as number]?.blocks.push(block)
  }

  #append (join: DecodeJoin): void {
    this.#rowOf.set(join.id, this.#rows.length)
    this.#rows.push({
      id: join.id,
      blocks: [...join.blocks],
      sampler: new Sampler(join.sampling, join.tokens, join.promptLength),
      positions: [...join.positions],
      length: join.tokens.length - 1,
      lastToken: join.tokens[join.tokens.length - 1] as number
    })
  }

  #leave (row: number): void {
    const last = this.#rows.length - 1
    this.#rowOf.delete((this.#rows[row] as Row).id)
    const moved = this.#rows.pop() as Row
    if (row === last) return
    this.#rows[row] = moved
    this.#rowOf.set(moved.id, row)
    const { kvHeads, headDim } = this.#shape
    const stride = kvHeads * this.#columns * headDim
    for (const past of this.#past) past.copyWithin(row * stride, last * stride, (last + 1) * stride)
    const width = this.#columns + 1
    this.#mask.copyWithin(row * width, last * width, (last + 1) * width)
  }

  #fits (rows: number, columns: number): boolean {
    const { kvHeads, headDim } = this.#shape
    return rows * (columns + 1) <= this.#mask.length && rows * columns * kvHeads * headDim <= (this.#past[0]?.length ?? 0)
  }

  #layOut (longest: number): void {
    this.#columns = Math.ceil((longest + HEADROOM) / ROUND) * ROUND
    const rows = this.#rows.length
    if (!this.#fits(rows, this.#columns)) {
      const { kvHeads, headDim, dtype } = this.#shape
      const cells = Math.ceil(Math.max(rows, 4) * (this.#columns + HEADROOM) * 1.25)
      this.#past = Array.from({ length: this.#kv.tensors }, () => newElements(dtype, cells * kvHeads * headDim))
      this.#mask = new BigInt64Array(cells)
    }
    for (let row = 0; row < rows; row++) this.#fill(row)
  }

  #fill (index: number): void {
    const row = this.#rows[index] as Row
    this.#kv.gather(this.#past, index, this.#columns, row.blocks, row.length)
    this.#clearSpare(index, row.length)
    const width = this.#columns + 1
    const mask = this.#mask.subarray(index * width, (index + 1) * width)
    mask.fill(1n, 0, row.length)
    mask.fill(0n, row.length, this.#columns)
    mask[this.#columns] = 1n
  }

  /**
   * Zeros the columns that a row does not use yet. The mask gives them no weight, but no weight times NaN is NaN: what another
   * sequence left there must not count.
   */
  #clearSpare (index: number, length: number): void {
    const { kvHeads, headDim } = this.#shape
    for (const past of this.#past) {
      for (let head = index * kvHeads; head < (index + 1) * kvHeads; head++) {
        past.fill(0, (head * this.#columns + length) * headDim, (head + 1) * this.#columns * headDim)
      }
    }
  }

  /** One token for every sequence, in the order of `ids`; an Error where sampling failed for that sequence alone. */
  async step (graph: DecoderGraph, embed: Session, ids: readonly number[], masks: ReadonlyMap<number, Uint32Array> = new Map()): Promise<Array<SampledToken | Error>> {
    const rows = this.#rows.length
    const { kvHeads, headDim, dtype } = this.#shape
    const input = BigInt64Array.from(this.#rows, row => BigInt(row.lastToken))
    const { inputs_embeds: embeds } = await embed.run({ input_ids: { type: 'int64', data: input, dims: [rows, 1] } })
    const feeds: Record<string, TensorData> = {
      inputs_embeds: embeds as TensorData,
      attention_mask: { type: 'int64', data: this.#mask.subarray(0, rows * (this.#columns + 1)), dims: [rows, this.#columns + 1] },
      position_ids: this.#positionIds()
    }
    const dims = [rows, kvHeads, this.#columns, headDim]
    const cells = rows * kvHeads * this.#columns * headDim
    graph.pastNames.forEach((name, t) => { feeds[name] = tensor(dtype, (this.#past[t] as Elements).subarray(0, cells), dims) })
    const { logits, added } = await graph.run(feeds, this.#columns, 1, true)
    const ran = performance.now()
    this.#extend(added)
    const extended = performance.now()
    const sampled = this.#sample(logits as TensorData, ids, masks)
    this.timings.extend += extended - ran
    this.timings.sample += performance.now() - extended
    return sampled
  }

  #positionIds (): TensorData {
    const axes = this.#shape.positionAxes
    const rows = this.#rows.length
    const data = new BigInt64Array(axes * rows)
    this.#rows.forEach((row, i) => row.positions.forEach((position, axis) => { data[axis * rows + i] = BigInt(position) }))
    return { type: 'int64', data, dims: axes === 1 ? [rows, 1] : [axes, rows, 1] }
  }

  /** Writes the new keys and values to the dense past and to the paged blocks. */
  #extend (added: readonly NewTokens[]): void {
    const { kvHeads, headDim, blockTokens } = this.#shape
    const columns = this.#columns
    added.forEach(({ data, length, offset }, t) => {
      const past = this.#past[t] as Elements
      const stride = length * headDim
      this.#rows.forEach((row, r) => {
        const from = r * kvHeads * stride + offset * headDim
        const block = row.blocks[Math.floor(row.length / blockTokens)] as number
        this.#kv.scatterToken(data, from, stride, t, block, row.length % blockTokens)
        if (row.length >= columns) return
        for (let head = 0; head < kvHeads; head++) {
          copyElements(data, from + head * stride, past, ((r * kvHeads + head) * columns + row.length) * headDim, headDim)
        }
      })
    })
    this.#rows.forEach((row, r) => {
      if (row.length < columns) this.#mask[r * (columns + 1) + row.length] = 1n
      row.length++
      for (let axis = 0; axis < row.positions.length; axis++) row.positions[axis] = (row.positions[axis] as number) + 1
    })
  }

  #sample (logits: TensorData, ids: readonly number[], masks: ReadonlyMap<number, Uint32Array>): Array<SampledToken | Error> {
    const width = logits.dims[logits.dims.length - 1] as number
    return ids.map(id => {
      const index = this.#rowOf.get(id) as number
      const row = this.#rows[index] as Row
      try {
        const sampled = row.sampler.sample(floatRow(logits.data, index, width), masks.get(id))
        row.lastToken = sampled.token
        return sampled
      } catch (err) {
        return err as Error
      }
    })
  }
}
