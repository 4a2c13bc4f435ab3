import type { EngineLog } from '../../service/engine-service.ts'
import type { CallResult, Device } from '../../runtime/types.ts'
import { ProgramHost } from '../../runtime/program-host.ts'
import type { Sequence, PrefillChunk } from '../sequence/sequence.ts'
import type { DecodeJoin } from './decode-batch.ts'
import type { FeatureRows, PrefillRow } from './prefill.ts'
import type { DecodeResult, RunnerMethods } from './program.ts'
import type { RunnerShape } from './shape.ts'

export interface RunnerOptions {
  readonly shape: RunnerShape
  readonly device: Device
  readonly threads: number
  readonly pools: { readonly kv: SharedArrayBuffer, readonly feature: SharedArrayBuffer }
  /** The features of a chunk. @default in the feature blocks that its sequence holds */
  readonly featuresOf?: ((chunk: PrefillChunk) => FeatureRows[]) | undefined
  readonly log?: EngineLog | undefined
}

/** The features a chunk needs, in feature blocks: the parts of its media spans that fall into it. */
function featuresOf ({ sequence, start, count }: PrefillChunk): FeatureRows[] {
  const rows: FeatureRows[] = []
  for (const span of sequence.spans) {
    const from = Math.max(span.start, start)
    const to = Math.min(span.start + span.length, start + count)
    if (from >= to) continue
    const entry = sequence.media[span.item]?.features
    if (entry?.state !== 'ready' && entry?.state !== 'dead') throw new Error(`sequence ${sequence.id}: features of item ${span.item} are not here`)
    rows.push({ at: from - start, rows: to - from, offset: span.offset + from - span.start, blocks: entry.blocks })
  }
  return rows
}

function prefillRow (chunk: PrefillChunk, axes: number, blockTokens: number, features: FeatureRows[]): PrefillRow {
  const { sequence, start, count } = chunk
  const positions = new Int32Array(axes * count)
  for (let axis = 0; axis < axes; axis++) for (let i = 0; i < count; i++) positions[axis * count + i] = sequence.positionOf(start + i, axis)
  return {
    tokens: Int32Array.from(sequence.tokens.slice(start, start + count)),
    positions,
    start,
    blocks: sequence.blocks.slice(0, Math.ceil((start + count) / blockTokens)),
    features
  }
}

function decodeJoin (sequence: Sequence, axes: number): DecodeJoin {
  const last = sequence.length - 1
  return {
    id: sequence.id,
    tokens: Int32Array.from(sequence.tokens),
    promptLength: sequence.promptLength,
    blocks: sequence.blocks,
    positions: Array.from({ length: axes }, (_, axis) => sequence.positionOf(last, axis)),
    sampling: sequence.sampling
  }
}

/** The main thread's side of the session worker: turns sequences into plain messages. */
export class Runner {
  readonly #host: ProgramHost<RunnerMethods>
  readonly #shape: RunnerShape
  readonly #featuresOf: (chunk: PrefillChunk) => FeatureRows[]
  /** The sequences of the last decode step, by id: how many of their blocks the worker knows, and their evictions until then. */
  #resident = new Map<number, { blocks: number, evictions: number }>()

  private constructor (host: ProgramHost<RunnerMethods>, { shape, featuresOf: from }: RunnerOptions) {
    this.#host = host
    this.#shape = shape
    this.#featuresOf = from ?? featuresOf
  }

  static async open (options: RunnerOptions): Promise<Runner> {
    const { shape, device, threads, pools, log } = options
    const host = await ProgramHost.open<RunnerMethods, RunnerShape>({
      program: new URL('./program.js', import.meta.url), device, threads, data: shape, pools, name: 'llm', log
    })
    return new Runner(host, options)
  }

  /** Why it does not work just now. */
  get problem (): string | undefined {
    return this.#host.problem
  }

  /** Time spent in the worker and, of it, in onnxruntime. */
  get totals (): Readonly<{ calls: number, busyUs: number, ortUs: number }> {
    return this.#host.totals
  }

  /** Milliseconds by what decode steps did beside running graphs, since the start. */
  async timings (): Promise<{ compose: number, extend: number, sample: number }> {
    return (await this.#host.call('timings', undefined)).value
  }

  async prefill (chunks: readonly PrefillChunk[]): Promise<CallResult<void>> {
    const { positionAxes, blockTokens } = this.#shape
    return await this.#host.call('prefill', chunks.map(chunk => prefillRow(chunk, positionAxes, blockTokens, this.#featuresOf(chunk))))
  }

  /** One token for each sequence, in their order. */
  async decode (sequences: readonly Sequence[]): Promise<CallResult<DecodeResult[]>> {
    const joins: DecodeJoin[] = []
    const blocks: Array<[number, number]> = []
    const masks: Array<[number, Uint32Array]> = []
    const resident = new Map<number, { blocks: number, evictions: number }>()
    for (const sequence of sequences) {
      const known = this.#resident.get(sequence.id)
      // A sequence that was evicted since has other blocks, so it joins anew.
      if (known?.evictions !== sequence.evictions) joins.push(decodeJoin(sequence, this.#shape.positionAxes))
      else for (let i = known.blocks; i < sequence.blocks.length; i++) blocks.push([sequence.id, sequence.blocks[i] as number])
      if (sequence.constraint?.mask !== undefined) masks.push([sequence.id, sequence.constraint.mask])
      resident.set(sequence.id, { blocks: sequence.blocks.length, evictions: sequence.evictions })
    }
    this.#resident = resident
    return await this.#host.call('decode', { ids: sequences.map(s => s.id), joins, blocks, masks })
  }

  /** A step failed and left the worker's batch in an unknown state: all sequences join anew. */
  reset (): void {
    this.#resident.clear()
  }

  close (): Promise<void> {
    return this.#host.close()
  }
}
