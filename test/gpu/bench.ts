/**
 * `npm run bench:gpu`: an encoder of ViT-300M's shape with random weights on CUDA, from pixels in host memory to features
 * in another engine's blocks. `-- --device cpu --layers 1 --tile 112 --quick` tries the script out without a GPU.
 */
import { ROOT_CONTEXT } from '@opentelemetry/api'
import * as ort from 'onnxruntime-node'
import { BlockPool, FeatureCache, LeaseTable } from '../../engines/cache/index.ts'
import { EngineCounters } from '../../engines/service/engine-service.ts'
import { EncodeStage } from '../../engines/encoder/encode-stage.ts'
import { featureBlockShape, featureBlocksFor, loadModel, type LoadedModel, type PreparedItem } from '../../engines/models/index.ts'
import { P2PNode } from '../../engines/p2p/index.ts'
import { cudaIndex } from '../../engines/runtime/device.ts'
import { quantile, table } from '../bench/report.ts'
import { gpuOptions, requireDevice, scratchFolder } from './options.ts'
import { VIT_300M, tokensOf, writeVitModel, type VitShape } from './vit-model.ts'

/** Published for this shape on one H100, PyTorch eager fp16 and onnxruntime-node, milliseconds by batch. */
const FIGURES: Readonly<Record<number, { pytorch: number, ort: number }>> = { 1: { pytorch: 11.9, ort: 6.4 }, 4: { pytorch: 18.6, ort: 18.5 }, 8: { pytorch: 35.2, ort: 35.1 } }
/** What the way through the engine may add to them. */
const TOLERANCE = 1.1
const FEATURE_BLOCKS = 1024

type Transport = 'ipc' | 'tcp'
interface Side { readonly pool: BlockPool, readonly node: P2PNode }

const options = gpuOptions()
const dir = scratchFolder()

function randomItem (shape: VitShape, tiles: number): PreparedItem {
  const length = tiles * 3 * shape.tile ** 2
  const pixels = Uint16Array.from({ length }, () => 0x3000 | (Math.random() * 0x83ff) & 0x83ff)
  return {
    grid: [tiles, 1], numTokens: tiles * tokensOf(shape), units: tiles, inputs: [{ name: 'pixel_values', batchAxis: 0, tensor: { type: 'float16', dims: [tiles, 3, shape.tile, shape.tile], data: pixels } }]
  }
}

/** The item's pixels are moved to the session worker by each encode: a copy for each round. */
function copyOf (item: PreparedItem): PreparedItem {
  return { ...item, inputs: item.inputs.map(input => ({ ...input, tensor: { ...input.tensor, data: input.tensor.data.slice() } as typeof input.tensor })) }
}

async function openSide (model: LoadedModel, engineId: string, pool: BlockPool, leases: LeaseTable, transport: Transport): Promise<Side> {
  const { hiddenSize, dtype, blockTokens } = featureBlockShape(model)
  const node = await P2PNode.open({
    engineId, epoch: leases.epoch, pools: { feature: { pool, shape: { block_tokens: blockTokens, hidden_size: hiddenSize, dtype } } }, leases, fingerprint: model.fingerprint, ipc: transport === 'ipc'
  })
  return { pool, node }
}

async function rounds (count: number, once: () => Promise<number>): Promise<number> {
  for (let i = 0; i < 3; i++) await once()
  const times: number[] = []
  for (let i = 0; i < count; i++) times.push(await once())
  return quantile(times, 0.5)
}

/** The session by itself in this thread: pixels in and features out of host memory. */
async function direct (path: string, shape: VitShape, tiles: number, count: number): Promise<number> {
  const cuda = cudaIndex(options.device)
  const session = await ort.InferenceSession.create(path, { executionProviders: [cuda === undefined ? 'cpu' : { name: 'cuda', deviceId: cuda }], logSeverityLevel: 4 })
  const [input] = randomItem(shape, tiles).inputs as [PreparedItem['inputs'][number]]
  const tensor = new ort.Tensor('float16', input.tensor.data as Uint16Array, input.tensor.dims)
  const ms = await rounds(count, async () => {
    const start = performance.now()
    await session.run({ pixel_values: tensor })
    return performance.now() - start
  })
  await session.release()
  return ms
}

interface Path { readonly encodeMs: number, readonly wireMs: number }

/** Pixels through the engine's encode stage into blocks, and on to another node's blocks. */
async function throughEngine (model: LoadedModel, shape: VitShape, tiles: number, transport: Transport, count: number): Promise<Path> {
  const { blockBytes } = featureBlockShape(model)
  const cache = new FeatureCache(new BlockPool({ name: 'feature', numBlocks: FEATURE_BLOCKS, blockBytes }))
  const leases = new LeaseTable(1)
  const producer = await openSide(model, 'http://producer', cache.pool, leases, transport)
  const consumer = await openSide(model, 'http://consumer', new BlockPool({ name: 'feature', numBlocks: 64, blockBytes }), new LeaseTable(2), transport)
  const stage = await EncodeStage.open({ model, device: options.device, threads: 4, cache, counters: new EngineCounters(), maxItems: 8, expected: () => 0 })
  try {
    const link = await consumer.node.connect(producer.node.endpoint)
    if (link.transport !== transport) throw new Error(`linked by ${link.transport} instead of ${transport}`)
    const item = randomItem(shape, tiles)
    const encodes: number[] = []
    let id = 0
    const wireMs = await rounds(count, async () => {
      const prepared = copyOf(item)
      const entry = cache.reserve(`h${++id}`, featureBlocksFor(item.numTokens), item)
      if (entry === undefined) throw new Error('no room for features')
      cache.ref(entry)
      const start = performance.now()
      await stage.encode(prepared, entry, ROOT_CONTEXT, new AbortController().signal)
      encodes.push(performance.now() - start)
      cache.commit(entry)
      const lease = leases.open({ consumer: 'http://consumer', pool: 'feature', blocks: entry.blocks, ttlMs: 60_000, onEnd: () => cache.unref(entry) })
      const name = { engineId: 'http://producer', epoch: 1, lease: lease.id }
      const localBlocks = consumer.pool.allocate(entry.blocks.length) as number[]
      await consumer.node.pull({ ...name, pool: 'feature', remoteBlocks: entry.blocks, localBlocks })
      const ms = performance.now() - start
      await consumer.node.ack(name)
      consumer.pool.release(localBlocks)
      return ms
    })
    return { encodeMs: quantile(encodes.slice(3), 0.5), wireMs }
  } finally {
    await Promise.all([stage.close(), consumer.node.close(), producer.node.close()])
  }
}

const COLUMNS = ['attention', 'tiles', 'PyTorch, H100', 'ort, H100', 'session here', 'to feature blocks', 'on the wire, ipc', 'on the wire, tcp', 'engine adds']

async function measure (fused: boolean): Promise<{ rows: string[][], met: boolean }> {
  const shape = { ...VIT_300M, layers: options.layers, tile: options.tile, fused }
  const folder = writeVitModel(`${dir}/${fused ? 'fused' : 'plain'}`, shape)
  const model = await loadModel(folder, { vision: true, decoder: false })
  const count = options.quick ? 5 : 40
  const rows: string[][] = []
  let met = true
  for (const [tiles, figure] of Object.entries(FIGURES).map(([batch, f]) => [Number(batch), f] as const)) {
    const session = await direct(model.files.vision as string, shape, tiles, count)
    const ipc = await throughEngine(model, shape, tiles, 'ipc', count)
    const tcp = await throughEngine(model, shape, tiles, 'tcp', count)
    met &&= ipc.wireMs <= figure.ort * TOLERANCE || ipc.wireMs <= figure.pytorch
    rows.push([
      fused ? 'one operator' : 'spelt out', String(tiles), `${figure.pytorch} ms`, `${figure.ort} ms`, `${session.toFixed(1)} ms`, `${ipc.encodeMs.toFixed(1)} ms`, `${ipc.wireMs.toFixed(1)} ms`, `${tcp.wireMs.toFixed(1)} ms`, `${(100 * (ipc.wireMs / session - 1)).toFixed(0)} %`
    ])
  }
  return { rows, met }
}

await requireDevice(options.device, dir)
const plain = await measure(false)
const fused = await measure(true)
console.log(`ViT of ${options.layers} layers, ${VIT_300M.width} wide, ${options.tile}x${options.tile} pixels, float16, on ${options.device}; medians.\n`)
console.log(table(COLUMNS, [...plain.rows, ...fused.rows]))
console.log('\n"To feature blocks" and "on the wire" begin with pixels in host memory; the wire ends in another engine\'s feature blocks, checksums verified.')
const met = plain.met || fused.met
const comparable = options.device !== 'cpu' && options.layers === VIT_300M.layers && options.tile === VIT_300M.tile
console.log(comparable ? `\nThe figures are ${met ? 'met' : 'NOT met'} end to end (within ${Math.round((TOLERANCE - 1) * 100)} %, or PyTorch's).` : '\nNot the device or the model of the figures: nothing to compare.')
process.exitCode = comparable && !met ? 1 : 0
