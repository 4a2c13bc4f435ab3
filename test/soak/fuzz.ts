/**
 * Attacks engines with frames on the link and with encoder results: `npm run fuzz -- [frames] [results] [seed]`, by default a
 * million frames and 100,000 results. Ends with 1 unless the engines are healthy afterwards, with all blocks free or cached.
 */
import { ROOT_CONTEXT } from '@opentelemetry/api'
import { pathToFileURL } from 'node:url'
import { Dealer } from 'zeromq'
import type { EncoderResultWire } from '../../adapters/wire/results.ts'
import { createEncoderEngine } from '../../engines/encoder/index.ts'
import { createLlmEngine } from '../../engines/llm/index.ts'
import type { P2PEndpointInfo } from '../../engines/p2p/index.ts'
import { shippedModel } from '../../engines/server/index.ts'
import type { EngineService } from '../../engines/service/engine-service.ts'
import { EngineError } from '../../engines/service/errors.ts'
import { seeded } from '../helper/random.ts'
import { drawScene } from '../helper/scenes.ts'

export interface FuzzReport {
  /** Frames that the engine refused, by reason. */
  readonly refused: Readonly<Record<string, number>>
  /** Answers to the results, by error code; `ok` where there was an answer. */
  readonly answers: Readonly<Record<string, number>>
  /** What is wrong afterwards. */
  readonly problems: readonly string[]
  /** After a tenth of the frames, after a tenth of the results, and at the end. */
  readonly memory: readonly Memory[]
}

/** Pools that fill at once. */
const SMALL_POOLS = { kvBlocks: 512, featureBlocks: 128 }
/** With fewer the memory of a young process says nothing. */
const MANY_RESULTS = 10_000
const FLAT = 1.1

/** MiB after a collection. What is held (heap and buffers of the main thread) is checked; V8 lets the resident part grow for long. */
interface Memory {
  readonly held: number
  readonly resident: number
}

type Below = (below: number) => number

const WORDS = ['__proto__', 'constructor', 'toString', 'hello', 'pull', 'credit', 'cancel', 'ack', 'release', 'offer', 'ask', 'offered', 'welcome', 'chunk', 'feature', 'kv', '', 'x'.repeat(3000), '\u0000', 'epd:', '\ud800']
const NUMBERS = [0, 1, -1, 0.5, 1e9, 2 ** 31, 2 ** 53, -(2 ** 53), 1e308, NaN]

function anything (below: Below, depth = 0): unknown {
  const kinds: Array<() => unknown> = [
    () => WORDS[below(WORDS.length)], () => NUMBERS[below(NUMBERS.length)], () => null, () => below(2) === 0, () => below(100),
    () => Array.from({ length: below(5) }, () => depth > 2 ? 0 : anything(below, depth + 1)),
    () => Object.fromEntries(Array.from({ length: below(4) }, () => [WORDS[below(WORDS.length)] as string, depth > 2 ? 0 : anything(below, depth + 1)]))
  ]
  return kinds[below(kinds.length)]!()
}

/** The object with one to three members replaced, removed, added or changed a little. */
export function mutate (object: object, below: Below): Record<string, unknown> {
  const changed: Record<string, unknown> = { ...object }
  for (let i = 1 + below(3); i > 0; i--) {
    const keys = Object.keys(changed)
    const key = keys[below(keys.length)] ?? 'x'
    const value = changed[key]
    switch (below(5)) {
      case 0: delete changed[key]; break
      case 1: changed[WORDS[below(WORDS.length)] as string] = anything(below); break
      case 2: changed[key] = typeof value === 'number' ? value + [1, -1, 1e6][below(3)]! : anything(below); break
      case 3: changed[key] = Array.isArray(value) ? [...value, ...value.slice(below(value.length + 1))] : anything(below); break
      default: changed[key] = anything(below)
    }
  }
  return changed
}

/** A frame: a message of the protocol, changed as an object or as bytes. */
function frameOf (templates: readonly object[], below: Below): Array<string | Buffer> {
  const text = JSON.stringify(mutate({ ...templates[below(templates.length)]!, ...(below(2) === 0 ? { id: `f${below(50)}` } : {}) }, below))
  const bytes = Buffer.from(text)
  switch (below(8)) {
    case 0: bytes[below(bytes.length)] = below(256); return [bytes]
    case 1: return [bytes.subarray(0, below(bytes.length))]
    case 2: return [text, Buffer.alloc(below(100))]
    case 3: return ['', text]
    default: return [text]
  }
}

async function answerOf (engine: EngineService, body: object, requestId: string): Promise<{ code: string, json?: unknown }> {
  try {
    const answer = await engine.chat({ body, signal: AbortSignal.any([]), requestId, context: ROOT_CONTEXT })
    return { code: 'ok', json: (answer as { json?: unknown }).json }
  } catch (err) {
    if (EngineError.is(err)) return { code: err.code }
    throw err
  }
}

function memoryNow (): Memory {
  globalThis.gc?.()
  const { rss, heapUsed, external } = process.memoryUsage()
  return { held: Math.round((heapUsed + external) / (1 << 20)), resident: Math.round(rss / (1 << 20)) }
}

export async function fuzz ({ frames, results, seed }: { frames: number, results: number, seed: number }): Promise<FuzzReport> {
  const below = seeded(seed)
  const log = { debug () {}, info () {}, warn () {}, error () {} }
  const base = { backend: 'pytorch' as const, modelDir: shippedModel(), host: '127.0.0.1', device: 'cpu', threads: 1, media: { allowPrivate: false, allowedDomains: [] }, log, ...SMALL_POOLS }
  const encoder = await createEncoderEngine({ ...base, engineId: 'http://encoder', role: 'encoder', vision: true, leaseMs: 2_000 })
  const engine = await createLlmEngine({ ...base, engineId: 'http://engine', role: 'hybrid', vision: false })
  const problems: string[] = []
  const answers: Record<string, number> = {}
  const memory: Memory[] = []
  try {
    await Promise.all([encoder.ready, engine.ready])
    const endpoint = encoder.p2p.endpoint as P2PEndpointInfo
    await engine.p2p.connect(endpoint)
    const picture = await drawScene(1)
    const encode = async (): Promise<EncoderResultWire> => {
      const answer = await answerOf(encoder, { messages: [{ role: 'user', content: [{ type: 'image_url', image_url: { url: picture } }] }] }, crypto.randomUUID())
      return (answer.json as { encoder_result: [EncoderResultWire] }).encoder_result[0]
    }
    const ask = async (result: object, lease: string, max: number): Promise<{ code: string, json?: unknown }> => await answerOf(engine, {
      messages: [{ role: 'user', content: [{ type: 'image_url', image_url: { url: `epd:${lease}` } }, { type: 'text', text: 'What is this?' }] }], encoder_result: [result], max_tokens: max, temperature: 0
    }, crypto.randomUUID())
    const textOf = async (): Promise<unknown> => {
      const result = await encode()
      return ((await ask(result, result.lease, 12)).json as { choices?: Array<{ message: { content: string } }> } | undefined)?.choices?.[0]?.message.content
    }
    const before = await textOf()

    const held = await encode()
    const common = { v: 1, id: 'f0', from: 'http://engine', engine: 'http://encoder', epoch: encoder.epoch, lease: held.lease, link: encoder.epoch }
    const templates = [
      { ...common, type: 'hello' }, { ...common, type: 'pull', pool: 'feature', blocks: held.remote_block_ids, bytes: 1024, chunk: 65536, window: 3 },
      { ...common, type: 'credit', upto: 3 }, { ...common, type: 'cancel' }, { ...common, type: 'ack' }, { ...common, type: 'release' }, { ...common, type: 'offer' }, { ...common, type: 'ask' }, { ...common, type: '__proto__' }
    ]
    const socket = new Dealer({ linger: 0, sendTimeout: 30_000, sendHighWaterMark: 100 })
    socket.connect(endpoint.tcp)
    const reading = (async () => { while (!socket.closed) await socket.receive().catch(() => { /* closed meanwhile */ }) })()
    for (let i = 0; i < frames; i++) {
      await socket.send(frameOf(templates, below))
      if (i === Math.floor(frames / 10)) memory.push(memoryNow())
    }
    socket.close()
    await reading

    for (let i = 0; i < results; i += 20) {
      const result = await encode()
      await Promise.all(Array.from({ length: Math.min(20, results - i) }, async () => {
        const changed = mutate(result, below)
        const { code } = await ask(below(50) === 0 ? [changed] : changed, typeof changed.lease === 'string' ? changed.lease : result.lease, 1)
        answers[code] = (answers[code] ?? 0) + 1
      }))
      encoder.endSession(result.lease)
      if (memory.length === 1 && i >= results / 10) memory.push(memoryNow())
    }
    if (await textOf() !== before) problems.push('the answer to an honest request has changed')
    for (const one of [encoder, engine]) {
      if (one.problem !== undefined) problems.push(one.problem)
      await settled(one)
      const gauges = one.gauges()
      for (const [name, total, free, cached] of [['feature', gauges.epd_feature_blocks_capacity, gauges.epd_feature_blocks_free, gauges.epd_feature_blocks_cached], ['kv', gauges.epd_kv_blocks_capacity, gauges.epd_kv_blocks_free, gauges.epd_kv_blocks_cached]] as const) {
        if ((free ?? 0) + (cached ?? 0) !== (total ?? 0)) problems.push(`${one.role}: of ${total} ${name} blocks ${free} are free and ${cached} cached`)
      }
      if (gauges.epd_leases_open !== 0) problems.push(`${one.role}: ${gauges.epd_leases_open} leases are open`)
    }
    memory.push(memoryNow())
    const [warm, last] = memory.slice(-2) as [Memory, Memory]
    if (results >= MANY_RESULTS && last.held > warm.held * FLAT) problems.push(`what is held in memory grew from ${warm.held} to ${last.held} MiB`)
    return { refused: encoder.p2p.refused ?? {}, answers, problems, memory }
  } finally {
    await Promise.all([encoder.close(), engine.close()])
  }
}

/** Leases end by themselves after their term. */
async function settled (engine: EngineService): Promise<void> {
  for (let i = 0; i < 100 && ((engine.gauges().epd_leases_open ?? 0) > 0 || Object.values(engine.sequences()).some(n => n > 0)); i++) await new Promise(resolve => { setTimeout(resolve, 50) })
}

if (import.meta.url === pathToFileURL(process.argv[1] ?? '').href) {
  const [frames = 1_000_000, results = 100_000, seed = Date.now() % 1e6] = process.argv.slice(2).map(Number)
  console.log(`${frames} frames, ${results} encoder results, seed ${seed}`)
  const since = performance.now()
  const report = await fuzz({ frames, results, seed })
  console.log(JSON.stringify(report, undefined, 2))
  console.log(`${((performance.now() - since) / 1000).toFixed(0)} s`)
  process.exitCode = report.problems.length === 0 ? 0 : 1
}
