/** An encoder engine without sockets, over the fake model, with means to look at its blocks. */
import { ROOT_CONTEXT } from '@opentelemetry/api'
import type { Test } from 'tap'
import sharp from 'sharp'
import { BlockPool, FeatureCache, LeaseTable } from '../../engines/cache/index.ts'
import { EngineCounters, type ChatCall, type EngineLog } from '../../engines/service/engine-service.ts'
import type { EncoderResultWire } from '../../adapters/wire/results.ts'
import { EncoderEngine, VisionRunner, type VisionOptions } from '../../engines/encoder/index.ts'
import { featureBlockShape, loadModel, type LoadedModel } from '../../engines/models/index.ts'
import { fakeModel, type FakeModelOptions } from '../helper/fake-model.ts'

const silent: EngineLog = { debug () {}, info () {}, warn () {}, error () {} }

export interface HarnessOptions extends FakeModelOptions, Partial<Omit<VisionOptions, 'model' | 'cache'>> {
  readonly blocks?: number
  readonly leaseMs?: number
  readonly maxItems?: number
}

export interface Harness {
  readonly engine: EncoderEngine
  readonly model: LoadedModel
  readonly cache: FeatureCache
  readonly leases: LeaseTable
  readonly counters: EngineCounters
  readonly vision: VisionRunner
  /** Sends a request with these content parts as one user message. */
  chat (parts: unknown[], call?: Partial<ChatCall>, body?: object): Promise<EncoderResultWire[]>
  /** Bytes of a result's features, read out of the blocks. */
  features (result: EncoderResultWire): Buffer
  /** Ends the leases as an ACK would. */
  ack (results: readonly EncoderResultWire[]): void
}

export async function harness (t: Test, options: HarnessOptions = {}): Promise<Harness> {
  const { blocks = 64, leaseMs, maxItems, type, width, ...vision } = options
  const model = await loadModel(fakeModel(t.testdir(), { ...(type && { type }), ...(width && { width }) }), { vision: true, decoder: false, name: 'fake' })
  const { blockBytes } = featureBlockShape(model)
  const cache = new FeatureCache(new BlockPool({ name: 'feature', numBlocks: blocks, blockBytes }))
  const leases = new LeaseTable(4711)
  const counters = new EngineCounters()
  const runner = VisionRunner.open({ device: 'cpu', threads: 1, media: { allowPrivate: false, allowedDomains: [] }, counters, ...vision, model, cache })
  const p2p = { endpoint: {}, connect: async () => {}, drop: () => {}, close: async () => {} }
  const engine = new EncoderEngine({ engineId: 'http://e', version: '0', model, cache, leases, p2p, counters, vision: runner, leaseMs, maxItems, log: silent })
  t.teardown(() => engine.close())
  await engine.ready
  let id = 0
  return {
    engine,
    model,
    cache,
    leases,
    counters,
    vision: await runner,
    chat: async (parts, call = {}, body = {}) => {
      const answer = await engine.chat({
        body: { ...body, messages: [{ role: 'user', content: parts }] }, signal: new AbortController().signal, requestId: `r${++id}`, context: ROOT_CONTEXT, ...call
      })
      return ((answer as { json: { encoder_result: EncoderResultWire[] } }).json).encoder_result
    },
    features: ({ num_tokens: tokens, remote_block_ids: ids }) => {
      const bytes = Buffer.concat(ids.map(block => cache.pool.bytes(block)))
      return bytes.subarray(0, tokens * model.hiddenSize * (model.dtype === 'float16' ? 2 : 4))
    },
    ack: results => { for (const { lease } of results) leases.end(lease, 'ack') }
  }
}

/** Everything given back: no lease, nothing held, and all blocks free once the cache is cleared. */
export function checkIdle (t: Test, h: Harness): void {
  t.equal(h.leases.openCount, 0, 'no lease is open')
  const { total, free, cached, referenced } = h.cache.stats
  t.same([free + cached, referenced], [total, 0], 'all blocks are free or cached')
  t.same(h.engine.sequences(), { waiting: 0, preprocessing: 0, running: 0 })
  h.engine.clearCache()
  h.cache.pool.checkIntegrity()
  t.equal(h.cache.stats.free, total)
}

/** A PNG of its own colour gradient for each seed. */
export async function picture (seed: number, width = 40, height = 40): Promise<Buffer> {
  const data = Buffer.alloc(width * height * 3)
  for (let i = 0; i < data.length; i++) data[i] = (seed * 97 + i * (seed + 3)) % 256
  return await sharp(data, { raw: { width, height, channels: 3 } }).png({ compressionLevel: 1 }).toBuffer()
}

export function dataUrl (bytes: Buffer, mime = 'image/png'): string {
  return `data:${mime};base64,${bytes.toString('base64')}`
}

export function imagePart (bytes: Buffer): object {
  return { type: 'image_url', image_url: { url: dataUrl(bytes) } }
}
