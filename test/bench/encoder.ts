/** The encoder engine by itself: from a request's body to features in blocks, with as many requests at once as the row says. */
import { ROOT_CONTEXT } from '@opentelemetry/api'
import sharp from 'sharp'
import { BlockPool, FeatureCache, LeaseTable } from '../../engines/cache/index.ts'
import type { EncoderResultWire } from '../../adapters/wire/results.ts'
import { EncoderEngine, VisionRunner } from '../../engines/encoder/index.ts'
import { EngineCounters } from '../../engines/service/engine-service.ts'
import { featureBlockShape, loadModel } from '../../engines/models/index.ts'
import { packageRoot } from '../helper/package-root.ts'
import { threadsPerEngine } from '../../engines/runtime/index.ts'
import { quantile, table, type BenchContext } from './report.ts'

export const name = 'encoder'

const CONCURRENCY = [1, 4, 16, 32]
const SIDE = 448

type Row = Array<string | number>

/** Pictures that differ, so that none is found in the cache: JPEG, about as large as a photo of that size. */
async function makePictures (count: number): Promise<string[]> {
  const urls: string[] = []
  for (let i = 0; i < count; i++) {
    const hue = (i * 47) % 360
    const svg = `<svg xmlns="http://www.w3.org/2000/svg" width="${SIDE}" height="${SIDE}"><rect width="100%" height="100%" fill="hsl(${hue},60%,70%)"/>` +
      `<circle cx="${40 + i % 300}" cy="${100 + i % 200}" r="60" fill="hsl(${(hue + 120) % 360},90%,40%)"/><text x="20" y="400" font-size="60">${i}</text></svg>`
    const bytes = await sharp(Buffer.from(svg)).jpeg({ quality: 90 }).toBuffer()
    urls.push(`data:image/jpeg;base64,${bytes.toString('base64')}`)
  }
  return urls
}

async function openEngine (): Promise<{ engine: EncoderEngine, vision: VisionRunner, leases: LeaseTable, threads: number }> {
  const model = await loadModel(`${packageRoot()}/engines/models/tiny-internvl`, { vision: true, decoder: false })
  const cache = new FeatureCache(new BlockPool({ name: 'feature', numBlocks: 2048, blockBytes: featureBlockShape(model).blockBytes }))
  const leases = new LeaseTable(1)
  const counters = new EngineCounters()
  const threads = threadsPerEngine()
  const runner = VisionRunner.open({ model, device: 'cpu', threads, cache, media: { allowPrivate: false, allowedDomains: [] }, counters })
  const log = { debug () {}, info () {}, warn () {}, error () {} }
  const p2p = { endpoint: {}, connect: async () => {}, drop: () => {}, close: async () => {} }
  const engine = new EncoderEngine({ engineId: 'http://bench', version: '0', model, cache, leases, p2p, counters, vision: runner, log })
  await engine.ready
  return { engine, vision: await runner, leases, threads }
}

type Bench = Awaited<ReturnType<typeof openEngine>>

async function encodeOne ({ engine, leases }: Bench, url: string, id: number): Promise<number> {
  const start = performance.now()
  const body = { messages: [{ role: 'user', content: [{ type: 'image_url', image_url: { url } }] }] }
  const answer = await engine.chat({ body, signal: new AbortController().signal, requestId: String(id), context: ROOT_CONTEXT })
  const ms = performance.now() - start
  const results = (answer as { json: { encoder_result: EncoderResultWire[] } }).json.encoder_result
  for (const { lease } of results) leases.end(lease, 'ack')
  return ms
}

/** Batch sizes of one row: what the histogram gained. */
function gained (before: ReadonlyMap<number, number>, after: ReadonlyMap<number, number>): string {
  return [...after].map(([size, count]) => [size, count - (before.get(size) ?? 0)] as const).filter(([, count]) => count > 0)
    .sort(([a], [b]) => a - b).map(([size, count]) => `${size}x${count}`).join(' ')
}

async function measure (bench: Bench, urls: readonly string[], concurrency: number, seed: number): Promise<Row> {
  bench.engine.clearCache()
  const before = { ...bench.vision.stats, batchSizes: new Map(bench.vision.stats.batchSizes) }
  const cpuBefore = process.cpuUsage()
  const times: number[] = []
  let next = 0
  const start = performance.now()
  await Promise.all(Array.from({ length: concurrency }, async () => {
    for (let i = next++; i < urls.length; i = next++) times.push(await encodeOne(bench, urls[i] as string, seed + i))
  }))
  const seconds = (performance.now() - start) / 1000
  const cpu = process.cpuUsage(cpuBefore)
  const after = bench.vision.stats
  const busyUs = after.busyUs - before.busyUs
  const ortUs = after.ortUs - before.ortUs
  const percent = (share: number): string => `${(share * 100).toFixed(1)} %`
  return [
    String(concurrency), urls.length / seconds, quantile(times, 0.5), quantile(times, 0.99), gained(before.batchSizes, after.batchSizes),
    percent(1 - ortUs / busyUs), percent(busyUs / 1e6 / seconds), (cpu.user + cpu.system) / 1000 / urls.length, ortUs / 1000 / urls.length
  ]
}

const COLUMNS = ['concurrent', 'items/s', 'p50 ms', 'p99 ms', 'batch sizes (size x runs)', 'session worker: share of busy time outside ort', 'session worker busy', 'process CPU ms/item', 'in ort, ms/item']

export async function run (context: BenchContext): Promise<string> {
  const urls = await makePictures(context.quick ? 48 : 320)
  const bench = await openEngine()
  try {
    await measure(bench, urls.slice(0, 16), 4, 1_000_000)
    const rows: Row[] = []
    for (const concurrency of CONCURRENCY) {
      context.log(`encoder: ${concurrency} at once`)
      rows.push(await measure(bench, urls, concurrency, concurrency * 1000))
    }
    return [
      '## Encoder engine',
      `The shipped model on the CPU, ${bench.threads} threads; JPEG pictures of ${SIDE}x${SIDE} (5 tiles each), every one new, from the parsed request to features in blocks.`,
      table(COLUMNS, rows),
      'Outside ort: joining inputs, scattering features, waking up. Process CPU includes decoding, resizing and hashing in other threads.'
    ].join('\n\n')
  } finally {
    await bench.engine.close()
  }
}
