/**
 * `npm run test:gpu`: what engines compute on CUDA is what they compute on the CPU. Features are compared as numbers,
 * answers as text: of both backends, by an engine that encodes itself, and by several that pull from each other.
 */
import { ROOT_CONTEXT } from '@opentelemetry/api'
import { BlockPool, FeatureCache } from '../../engines/cache/index.ts'
import { EngineCounters } from '../../engines/service/engine-service.ts'
import { EncodeStage } from '../../engines/encoder/encode-stage.ts'
import { shippedModel, startEngine, type ApiServer, type StartEngineOptions } from '../../engines/index.ts'
import { featureBlockShape, featureBlocksFor, loadModel, type LoadedModel, type PreparedItem } from '../../engines/models/index.ts'
import { fromFloat16, type Device } from '../../engines/runtime/index.ts'
import { table } from '../bench/report.ts'
import { dataUrl, makeScene, questionsFor, renderScene, seededRandom } from '../helper/pictures.ts'
import { gpuOptions, requireDevice, scratchFolder } from './options.ts'
import { VIT_300M, tokensOf, writeVitModel } from './vit-model.ts'

const options = gpuOptions()
const dir = scratchFolder()
const PICTURES = options.quick ? 4 : 24
/** CUDA multiplies in TF32 or half precision: features differ in the third or fourth digit, directions do not. */
const MIN_COSINE = 0.999

interface Check { readonly what: string, readonly found: string, readonly wanted: string, readonly ok: boolean }

async function features (model: LoadedModel, device: Device, items: readonly PreparedItem[]): Promise<Float64Array[]> {
  const { blockBytes } = featureBlockShape(model)
  const cache = new FeatureCache(new BlockPool({ name: 'feature', numBlocks: 512, blockBytes }))
  const stage = await EncodeStage.open({ model, device, threads: 4, cache, counters: new EngineCounters(), maxItems: 8, expected: () => 0 })
  try {
    return await Promise.all(items.map(async (item, i) => {
      const entry = cache.reserve(`h${i}`, featureBlocksFor(item.numTokens), item)
      if (entry === undefined) throw new Error('no room for features')
      const prepared = { ...item, inputs: item.inputs.map(input => ({ ...input, tensor: { ...input.tensor, data: input.tensor.data.slice() } as typeof input.tensor })) }
      await stage.encode(prepared, entry, ROOT_CONTEXT, new AbortController().signal)
      const bytes = Uint8Array.from(Buffer.concat(entry.blocks.map(id => cache.pool.bytes(id)))).buffer
      const length = item.numTokens * model.hiddenSize
      return model.dtype === 'float32' ? Float64Array.from(new Float32Array(bytes, 0, length)) : Float64Array.from(new Uint16Array(bytes, 0, length), fromFloat16)
    }))
  } finally {
    await stage.close()
  }
}

/** Least cosine of two lists of vectors' rows. */
function leastCosine (a: readonly Float64Array[], b: readonly Float64Array[], width: number): number {
  let least = 1
  for (const [i, left] of a.entries()) {
    const right = b[i] as Float64Array
    for (let row = 0; row < left.length; row += width) {
      let [dot, l, r] = [0, 0, 0]
      for (let j = row; j < row + width; j++) {
        const [x, y] = [left[j] as number, right[j] as number]
        dot += x * y
        l += x * x
        r += y * y
      }
      const cosine = dot / Math.sqrt(l * r)
      least = Number.isNaN(cosine) ? -1 : Math.min(least, cosine)
    }
  }
  return least
}

async function compareFeatures (what: string, model: LoadedModel, items: readonly PreparedItem[]): Promise<Check> {
  const cpu = await features(model, 'cpu', items)
  const device = await features(model, options.device, items)
  const cosine = leastCosine(cpu, device, model.hiddenSize)
  return { what, found: cosine.toFixed(6), wanted: `cosine >= ${MIN_COSINE}`, ok: cosine >= MIN_COSINE }
}

async function post (url: string, path: string, body: object): Promise<Record<string, unknown>> {
  const response = await fetch(url + path, { method: 'POST', headers: { 'content-type': 'application/json' }, body: JSON.stringify(body) })
  const json = await response.json() as Record<string, unknown>
  if (!response.ok) throw new Error(`${path} answered ${response.status}: ${JSON.stringify(json)}`)
  return json
}

type Role = StartEngineOptions['role']
type Backend = StartEngineOptions['backend']

function engine (role: Role, device: Device, vision: boolean, backend: Backend = 'pytorch'): Promise<ApiServer> {
  return startEngine({
    role, backend, modelDir: shippedModel(), host: '127.0.0.1', port: 0, device, vision, media: { allowPrivate: false, allowedDomains: [] }, logger: false
  })
}

interface Asked { readonly url: string, readonly question: string }

function requestOf ({ url, question }: Asked): { messages: object[], max_tokens: number, temperature: number } {
  return { messages: [{ role: 'user', content: [{ type: 'image_url', image_url: { url } }, { type: 'text', text: question }] }], max_tokens: 48, temperature: 0 }
}

function textOf (answer: Record<string, unknown>): string {
  const [choice] = answer.choices as Array<{ message: { content: string } }>
  return choice?.message.content ?? ''
}

async function answersOf (device: Device, asked: readonly Asked[], backend: Backend = 'pytorch'): Promise<string[]> {
  const server = await engine('hybrid', device, true, backend)
  try {
    return await Promise.all(asked.map(async one => textOf(await post(server.url, '/v1/chat/completions', requestOf(one)))))
  } finally {
    await server.close()
  }
}

/** Links the consumer to the producer by the two calls a gateway makes. */
async function link (producer: ApiServer, consumer: ApiServer): Promise<void> {
  const made = await post(producer.url, '/distserve/p2p_initialize', { local_engine_id: producer.url, remote_engine_id: consumer.url, protocol: 1 })
  const linked = await post(consumer.url, '/distserve/p2p_connect', {
    remote_engine_id: producer.url, protocol: 1, remote_engine_endpoint_info: made.engine_endpoint_info, remote_kvtransfer_endpoint_info: made.kvtransfer_endpoint_info
  })
  if (linked.status !== 1) throw new Error(`the engines can't be linked: ${String(linked.message)}`)
}

/** The request as a gateway sends it on once the encoder has answered: a lease in the picture's place. */
async function encoded (encoder: ApiServer, one: Asked): Promise<object> {
  const { encoder_result: results } = await post(encoder.url, '/v1/chat/completions', { messages: [{ role: 'user', content: [{ type: 'image_url', image_url: { url: one.url } }] }] })
  const [{ lease }] = results as [{ lease: string }]
  return { ...requestOf({ ...one, url: `epd:${lease}` }), encoder_result: results }
}

/** Encoder and language engine as two engines, features over the link. */
async function answersByEpd (device: Device, asked: readonly Asked[], backend: Backend = 'pytorch'): Promise<string[]> {
  const encoder = await engine('encoder', device, true)
  const language = await engine('hybrid', device, false, backend)
  try {
    await link(encoder, language)
    return await Promise.all(asked.map(async one => textOf(await post(language.url, '/v1/chat/completions', await encoded(encoder, one)))))
  } finally {
    await Promise.all([encoder.close(), language.close()])
  }
}

/** E -> P -> D: features and then keys and values over the link. */
async function answersByHandoff (device: Device, asked: readonly Asked[]): Promise<string[]> {
  const encoder = await engine('encoder', device, true)
  const prefill = await engine('prefill', device, false)
  const decode = await engine('decode', device, false)
  try {
    await link(encoder, prefill)
    await link(prefill, decode)
    return await Promise.all(asked.map(async one => {
      const { migration_request: handoff } = await post(prefill.url, '/v1/chat/completions', { ...await encoded(encoder, one), max_tokens: 1, with_cache: true, preserve_cache: true })
      return textOf(await post(decode.url, '/v1/chat/completions', { ...requestOf({ ...one, url: 'epd:handed-over' }), migration_request: handoff }))
    }))
  } finally {
    await Promise.all([encoder.close(), prefill.close(), decode.close()])
  }
}

function compareAnswers (what: string, cpu: readonly string[], device: readonly string[], asked: readonly Asked[]): Check {
  const different = cpu.flatMap((answer, i) => answer === device[i] ? [] : [i])
  for (const i of different) console.log(`${what}: "${asked[i]?.question}": CPU "${cpu[i]}", ${options.device} "${device[i]}"`)
  return { what, found: `${cpu.length - different.length} of ${cpu.length}`, wanted: 'all equal', ok: different.length === 0 }
}

await requireDevice(options.device, dir)
const checks: Check[] = []

const tiny = await loadModel(shippedModel(), { vision: true, decoder: false })
const random = seededRandom(11)
const scenes = Array.from({ length: PICTURES }, () => makeScene(random))
const pictures = await Promise.all(scenes.map(scene => renderScene(scene)))
checks.push(await compareFeatures('features of the shipped model (float32)', tiny, await Promise.all(pictures.map(bytes => tiny.prepare(bytes, {})))))

const shape = { ...VIT_300M, layers: 2, tile: 112 }
for (const fused of [false, true]) {
  const model = await loadModel(writeVitModel(`${dir}/${String(fused)}`, { ...shape, fused }), { vision: true, decoder: false })
  const pixels = Uint16Array.from({ length: 2 * 3 * shape.tile ** 2 }, () => 0x3000 | Math.floor(random() * 0x8000) & 0x83ff)
  const item: PreparedItem = { grid: [2, 1], numTokens: 2 * tokensOf(shape), units: 2, inputs: [{ name: 'pixel_values', batchAxis: 0, tensor: { type: 'float16', dims: [2, 3, shape.tile, shape.tile], data: pixels } }] }
  checks.push(await compareFeatures(`features of a float16 ViT, attention ${fused ? 'as one operator' : 'spelt out'}`, model, [item]))
}

const asked = scenes.flatMap((scene, i) => questionsFor(scene, random).slice(0, 3).map(({ text }) => ({ url: dataUrl(pictures[i] as Buffer), question: text })))
const cpuAnswers = await answersOf('cpu', asked)
checks.push(compareAnswers('answers, engine encodes itself', cpuAnswers, await answersOf(options.device, asked), asked))
checks.push(compareAnswers('answers, E -> PD', cpuAnswers, await answersByEpd(options.device, asked), asked))
checks.push(compareAnswers('answers, E -> P -> D', cpuAnswers, await answersByHandoff(options.device, asked), asked))
checks.push(compareAnswers('answers, TurboMind-like engine encodes itself', cpuAnswers, await answersOf(options.device, asked, 'turbomind'), asked))
checks.push(compareAnswers('answers, E -> TurboMind-like engine', cpuAnswers, await answersByEpd(options.device, asked, 'turbomind'), asked))

console.log(table(['check', 'found', 'wanted', ''], checks.map(({ what, found, wanted, ok }) => [what, found, wanted, ok ? 'ok' : 'FAILED'])))
process.exitCode = checks.every(check => check.ok) ? 0 : 1
