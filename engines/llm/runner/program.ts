/** Runs in the session worker: the only place where the LLM engine has tensors. */
import type { ProgramContext } from '../../runtime/types.ts'
import { DecodeBatch, type DecodeJoin } from './decode-batch.ts'
import { DecoderGraph } from './decoder-graph.ts'
import { elementTypeOf } from './elements.ts'
import { KvStore } from './kv-store.ts'
import { Prefiller, type PrefillRow } from './prefill.ts'
import type { RunnerShape } from './shape.ts'
import type { SampledToken } from '../sequence/sampling.ts'

export interface DecodeStep {
  /** The sequences of the step, by id; the answer has their order. */
  readonly ids: readonly number[]
  /** Those of them that were not in the last step's batch. */
  readonly joins: readonly DecodeJoin[]
  /** Blocks that sequences got since the last step. */
  readonly blocks: ReadonlyArray<readonly [id: number, block: number]>
  /** For sequences whose output is constrained: one bit for each token that may come next. */
  readonly masks: ReadonlyArray<readonly [id: number, mask: Uint32Array]>
}

/** One sampled token, or why sampling failed for this sequence alone. */
export type DecodeResult = SampledToken | { readonly error: string }

export type RunnerMethods = {
  prefill (rows: readonly PrefillRow[]): Promise<void>
  decode (step: DecodeStep): Promise<DecodeResult[]>
  /** Milliseconds of decode steps outside of running graphs. */
  timings (args: undefined): DecodeBatch['timings']
}

export async function create ({ openSession, data: shape, pools }: ProgramContext<RunnerShape>): Promise<RunnerMethods> {
  const embed = await openSession(shape.embed)
  const graph = new DecoderGraph(await openSession(shape.decoder), shape.layers)
  const found = elementTypeOf(graph.session, 'inputs', 'inputs_embeds')
  if (found !== shape.dtype || elementTypeOf(graph.session, 'inputs', graph.pastNames[0] as string) !== shape.dtype) {
    throw new Error(`the decoder takes ${found} where features are ${shape.dtype}`)
  }
  const kv = new KvStore(shape, pools.kv as SharedArrayBuffer)
  const prefiller = new Prefiller(shape, kv, pools.feature as SharedArrayBuffer)
  const batch = new DecodeBatch(shape, kv)
  return {
    timings: () => batch.timings,
    prefill: rows => prefiller.run(graph, embed, rows),
    async decode ({ ids, joins, blocks, masks }) {
      for (const [id, block] of blocks) batch.addBlock(id, block)
      batch.compose(ids, joins)
      const results = await batch.step(graph, embed, ids, new Map(masks))
      return results.map(result => result instanceof Error ? { error: result.message } : result)
    }
  }
}
