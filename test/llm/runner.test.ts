import t from 'tap'
import { DecodeBatch, type DecodeJoin } from '../../engines/llm/runner/decode-batch.ts'
import { DecoderGraph } from '../../engines/llm/runner/decoder-graph.ts'
import { elementTypeOf } from '../../engines/llm/runner/elements.ts'
import { KvStore } from '../../engines/llm/runner/kv-store.ts'
import { overlayFeatures, Prefiller } from '../../engines/llm/runner/prefill.ts'
import { kvBlockElements, type RunnerShape } from '../../engines/llm/runner/shape.ts'
import { GREEDY, type SampledToken } from '../../engines/llm/sequence/sampling.ts'
import { openSession } from '../../engines/runtime/ort.ts'
import type { Session } from '../../engines/runtime/types.ts'
import { loadModel } from '../../engines/models/index.ts'
import { tinyModelDir } from '../helper/tiny-model.ts'

const BLOCK = 16

async function open (): Promise<{ shape: RunnerShape, embed: Session, decoder: Session }> {
  const model = await loadModel(tinyModelDir, { vision: false, decoder: true })
  const { embed, decoder } = model.files as { embed: string, decoder: string }
  const { layers, kvHeads, headDim } = model.text
  const shape: RunnerShape = { embed, decoder, layers, kvHeads, headDim, hiddenSize: model.hiddenSize, dtype: 'float32', blockTokens: BLOCK, featureBlockTokens: 32, positionAxes: 1 }
  const sessions = await Promise.all([openSession(embed, 'cpu', 1), openSession(decoder, 'cpu', 1)])
  t.teardown(() => Promise.all(sessions.map(session => session.release())))
  return { shape, embed: sessions[0], decoder: sessions[1] }
}

/** The graph as most exports have it. */
function withoutDelta (session: Session): Session {
  return { inputs: session.inputs, outputs: session.outputs.filter(spec => !spec.name.startsWith('delta')), run: (feeds, fetches) => session.run(feeds, fetches), release: async () => {} }
}

interface Bench {
  readonly kv: KvStore
  readonly batch: DecodeBatch
  prefill (tokens: readonly number[], blocks: readonly number[], chunk: number): Promise<void>
  step (ids: readonly number[], joins?: readonly DecodeJoin[]): Promise<number[]>
}

function bench (shape: RunnerShape, embed: Session, decoder: Session): Bench {
  const kv = new KvStore(shape, new SharedArrayBuffer(64 * kvBlockElements(shape) * 4))
  const graph = new DecoderGraph(decoder, shape.layers)
  const batch = new DecodeBatch(shape, kv)
  const prefiller = new Prefiller(shape, kv, new SharedArrayBuffer(1024))
  return {
    kv,
    batch,
    async prefill (tokens, blocks, chunk) {
      for (let start = 0; start < tokens.length - 1; start += chunk) {
        const part = Int32Array.from(tokens.slice(start, Math.min(start + chunk, tokens.length - 1)))
        await prefiller.run(graph, embed, [{ tokens: part, positions: part.map((_, i) => start + i), start, blocks, features: [] }])
      }
    },
    async step (ids, joins = []) {
      batch.compose(ids, joins)
      return (await batch.step(graph, embed, ids)).map(result => (result as SampledToken).token)
    }
  }
}

function join (id: number, tokens: readonly number[], blocks: readonly number[]): DecodeJoin {
  return { id, tokens: Int32Array.from(tokens), promptLength: tokens.length, blocks, positions: [tokens.length - 1], sampling: GREEDY }
}

const prompt = (seed: number, length: number): number[] => Array.from({ length }, (_, i) => (seed * 131 + i * i * 17) % 1000)
const blocksOf = (row: number): number[] => [0, 1, 2, 3, 4, 5, 6, 7].map(i => i * 8 + row)

t.test('a graph without delta outputs gives the same tokens from its present outputs', async t => {
  const { shape, embed, decoder } = await open()
  t.ok(new DecoderGraph(decoder, shape.layers).hasDelta)
  t.notOk(new DecoderGraph(withoutDelta(decoder), shape.layers).hasDelta)
  const run = async (session: Session): Promise<number[][]> => {
    const b = bench(shape, embed, session)
    const out: number[][] = []
    for (const [id, length] of [[1, 40], [2, 9]] as const) await b.prefill(prompt(id, length), blocksOf(id), 16)
    for (let i = 0; i < 6; i++) out.push(await b.step([1, 2], i === 0 ? [join(1, prompt(1, 40), blocksOf(1)), join(2, prompt(2, 9), blocksOf(2))] : []))
    return out
  }
  t.same(await run(withoutDelta(decoder)), await run(decoder))
  t.throws(() => new DecoderGraph({ ...withoutDelta(decoder), outputs: [] }, shape.layers), /lacks: logits/)
  t.throws(() => elementTypeOf(decoder, 'inputs', 'attention_mask'), /attention_mask/)
})

t.test('rows join, leave, outgrow their columns and come back, and every row goes on as if alone', async t => {
  const { shape, embed, decoder } = await open()
  const lengths = [5, 30, 70, 18]
  const alone: number[][] = []
  for (const [id, length] of lengths.entries()) {
    const b = bench(shape, embed, decoder)
    const tokens = prompt(id, length)
    await b.prefill(tokens, blocksOf(id), 1000)
    const out: number[] = []
    for (let i = 0; i < 45; i++) out.push(...await b.step([id], i === 0 ? [join(id, tokens, blocksOf(id))] : []))
    alone.push(out)
  }
  const b = bench(shape, embed, decoder)
  const made: number[][] = lengths.map(() => [])
  const inBatch = new Set<number>()
  const run = async (ids: readonly number[], steps: number): Promise<void> => {
    for (let i = 0; i < steps; i++) {
      const joins = ids.filter(id => !inBatch.has(id)).map(id => join(id, [...prompt(id, lengths[id]!), ...made[id]!], blocksOf(id)))
      inBatch.clear()
      for (const id of ids) inBatch.add(id)
      for (const [k, token] of (await b.step(ids, joins)).entries()) made[ids[k]!]!.push(token)
    }
  }
  for (const [id, length] of lengths.entries()) await b.prefill(prompt(id, length), blocksOf(id), 7)
  await run([0, 1], 5)
  await run([1, 0, 2], 10)
  await run([2], 20)
  await run([3, 0], 12)
  await run([0, 1, 2, 3], 9)
  for (const [id, tokens] of made.entries()) t.same(tokens, alone[id]!.slice(0, tokens.length), `row ${id}, ${tokens.length} tokens`)
  await t.rejects(b.step([99]), /never joined/)
})

t.test('features take their rows out of blocks, from any offset', async t => {
  const shape = { hiddenSize: 2, featureBlockTokens: 4 } as RunnerShape
  const pool = Float32Array.from({ length: 2 * 4 * 8 }, (_, i) => i)
  const embeds = new Float32Array(2 * 8 * 2).fill(-1)
  overlayFeatures(embeds, 1, 8, [{ at: 2, rows: 5, offset: 2, blocks: [3, 1] }], pool, shape)
  const rows = (n: number): number[] => [n * 2, n * 2 + 1]
  t.same([...embeds.subarray(16)], [-1, -1, -1, -1, ...[14, 15, 4, 5, 6].flatMap(rows), -1, -1])
  t.ok(embeds.subarray(0, 16).every(v => v === -1))
})
