import { once } from 'node:events'
import { createServer } from 'node:http'
import type { AddressInfo } from 'node:net'
import { ROOT_CONTEXT, trace } from '@opentelemetry/api'
import { InMemorySpanExporter, BasicTracerProvider, SimpleSpanProcessor } from '@opentelemetry/sdk-trace-base'
import * as ort from 'onnxruntime-node'
import t, { type Test } from 'tap'
import { EngineError } from '../../engines/service/errors.ts'
import { BlockPool, LeaseTable } from '../../engines/cache/index.ts'
import { P2PNode, type P2PEndpointInfo } from '../../engines/p2p/index.ts'
import type { EncoderResultWire } from '../../adapters/wire/results.ts'
import { createEncoderEngine } from '../../engines/encoder/index.ts'
import { featureBlockShape, type LoadedModel, type PreparedItem } from '../../engines/models/index.ts'
import { fakeModel } from '../helper/fake-model.ts'
import { pngHeader } from '../helper/png.ts'
import { until } from '../helper/until.ts'
import { checkIdle, dataUrl, harness, imagePart, picture, type Harness } from './harness.ts'

const FULL = process.env.EPD_TEST_FULL === '1'

/** The bytes the ONNX graph gives for this picture when run directly, in this thread. */
async function direct (model: LoadedModel, bytes: Buffer): Promise<Buffer> {
  const session = await ort.InferenceSession.create(model.files.vision as string, { intraOpNumThreads: 1 })
  const { inputs } = await model.prepare(bytes, {}) as PreparedItem
  const [{ tensor }] = inputs as [PreparedItem['inputs'][number]]
  const out = await session.run({ pixel_values: new ort.Tensor(tensor.type, tensor.data as Float32Array, tensor.dims) })
  await session.release()
  const { buffer, byteOffset, byteLength } = out.image_features?.data as Float32Array
  return Buffer.from(buffer, byteOffset, byteLength)
}

async function rejection (promise: Promise<unknown>): Promise<{ code?: string, status?: number, param?: string, message: string, retryAfter?: number }> {
  try {
    await promise
  } catch (err) {
    return err as Error
  }
  throw new Error('it did not fail')
}

for (const type of ['float32', 'float16'] as const) {
  t.test(`features are those of the ONNX graph run directly, bit for bit, alone and in a batch (${type})`, async t => {
    const h = await harness(t, { type })
    const pictures = await Promise.all([1, 2, 3, 4, 5].map((seed, i) => picture(seed, 20 + 30 * i, 60)))
    const results = await h.chat(pictures.map(imagePart))
    t.same(results.map(r => [r.message, r.part, r.modality, r.dtype, r.hidden_size, r.protocol, r.remote_engine_id, r.epoch, r.cached]),
      pictures.map((_, i) => [0, i, 'image', type, 8, 1, 'http://e', 4711, false]))
    for (const [i, result] of results.entries()) t.ok(h.features(result).equals(await direct(h.model, pictures[i] as Buffer)), `picture ${i} of ${result.num_tokens} tokens`)
    t.equal(new Set(results.flatMap(r => r.remote_block_ids)).size, results.flatMap(r => r.remote_block_ids).length, 'no block is used twice')
    t.ok([...h.vision.stats.batchSizes.keys()].some(size => size > 1), 'some of them shared a run')
    h.ack(results)
    t.equal(h.counters.acks, 5)
    checkIdle(t, h)
  })
}

t.test('a repeated picture is not encoded again, though its lease was ACKed', async t => {
  const h = await harness(t)
  const part = imagePart(await picture(1))
  const first = await h.chat([part])
  h.ack(first)
  const second = await h.chat([{ type: 'text', text: 'again' }, part])
  t.same([first[0]?.cached, second[0]?.cached, second[0]?.part], [false, true, 1])
  t.equal(second[0]?.content_hash, first[0]?.content_hash)
  t.not(second[0]?.lease, first[0]?.lease)
  t.same([h.counters.encodedItems, h.counters.encoderCacheHits, h.vision.stats.runs], [1, 1, 1])
  h.ack(second)
  const other = await h.chat([part], { tenant: 'somebody else' })
  t.notOk(other[0]?.cached, 'tenants do not share features')
  const smaller = await h.chat([{ type: 'image_url', image_url: { url: (part as { image_url: { url: string } }).image_url.url, max_dynamic_patch: 1 } }])
  t.same([smaller[0]?.cached, smaller[0]?.num_tokens], [false, 4], 'settings are part of the content hash')
  const same = await h.chat([part], {}, { mm_processor_kwargs: { image: { max_dynamic_patch: 1 } } })
  t.same([same[0]?.cached, same[0]?.content_hash], [true, smaller[0]?.content_hash], 'wherever they stand in the request')
  h.ack([...other, ...smaller, ...same])
  checkIdle(t, h)
})

t.test('32 requests with the same picture at once encode it once, with a lease for each', async t => {
  const h = await harness(t)
  const part = imagePart(await picture(9, 300, 300))
  const results = (await Promise.all(Array.from({ length: 32 }, () => h.chat([part])))).flat()
  t.equal(h.counters.encodedItems, 1)
  t.equal(h.counters.encoderCacheHits, 31)
  t.equal(new Set(results.map(r => r.lease)).size, 32)
  t.equal(new Set(results.map(r => r.remote_session_id)).size, 32)
  t.equal(new Set(results.map(r => r.remote_block_ids.join())).size, 1)
  t.equal(results.filter(r => !r.cached).length, 1)
  h.ack(results.slice(1))
  t.equal(h.cache.stats.cached, 0, 'blocks under a lease are not evictable')
  h.ack(results)
  checkIdle(t, h)
})

t.test('requests at once share runs, never beyond the limit', async t => {
  const h = await harness(t, { maxBatchSize: 4, width: 256, blocks: 128 })
  const parts = await Promise.all(Array.from({ length: 24 }, async (_, i) => imagePart(await picture(i))))
  const results = (await Promise.all(parts.map(part => h.chat([part])))).flat()
  const sizes = [...h.vision.stats.batchSizes.keys()]
  t.ok(Math.max(...sizes) <= 4 && Math.max(...sizes) > 1, `batch sizes ${sizes.join()}`)
  t.equal(h.vision.stats.items, 24)
  t.equal(h.counters.encodedItems, 24)
  h.ack(results)
  checkIdle(t, h)
})

t.test('LMDeploy\'s earlier item kinds still work', async t => {
  const h = await harness(t)
  const bytes = await picture(3)
  const url = dataUrl(bytes)
  const base64 = bytes.toString('base64')
  const results = await h.chat([
    { type: 'image_url', image_url: url }, { type: 'image_data', image_data: { data: url } }, { type: 'image_data', image_data: base64 },
    { type: 'image', image: url }, { type: 'image', url }, { type: 'image_url', image_url: { url, detail: 'high' } }, { type: 'image', image: { data: base64 } },
    // The bytes decide: clients write any type.
    ...['image/jpeg', 'image/jpg', 'image/webp', 'image', 'image/*', 'binary/octet-stream', 'None', 'text/plain', 'image/png;name=a.png', ''].map(mime => ({ type: 'image_url', image_url: { url: `data:${mime};base64,${base64}` } })),
    { type: 'image_url', image_url: { url: `data:;base64,${base64.replace(/(.{76})/g, '$1\r\n')}` } }
  ])
  t.equal(results.length, 18)
  t.equal(new Set(results.map(r => r.content_hash)).size, 1)
  h.ack(results)
  checkIdle(t, h)
})

t.test('text alone is refused: an encoder generates none', async t => {
  const h = await harness(t)
  for (const body of [{ messages: [{ role: 'user', content: 'hello' }] }, { messages: [{ role: 'user', content: [{ type: 'text', text: 'hi' }] }] }, { messages: [] }]) {
    const err = await rejection(h.engine.chat({ body, signal: AbortSignal.any([]), requestId: 'x', context: ROOT_CONTEXT }))
    t.match(err, { status: 400, code: 'unsupported', message: /only encodes media/ })
  }
})

t.test('every bad item is a 400 that names its part, and the engine goes on', async t => {
  const h = await harness(t, { maxItems: 4 })
  const png = await picture(1)
  const url = dataUrl(png)
  const cases: Array<[string, unknown, RegExp, string?]> = [
    ['invalid_media', { type: 'image_url', image_url: { url: dataUrl(png.subarray(0, png.length - 40)) } }, /can't be decoded/],
    ['invalid_media', { type: 'image_url', image_url: { url: dataUrl(pngHeader(50_000, 50_000)) } }, /too large: 50000x50000/],
    ['invalid_media', { type: 'image_url', image_url: { url: dataUrl(Buffer.from('just text'), 'image/png') } }, /no picture of a supported format/],
    ['invalid_media', { type: 'image_url', image_url: { url: 'data:image/png;base64,iVBOR$$$' } }, /base64 text is not valid/],
    ['invalid_media', { type: 'image_url', image_url: { url: 'data:image/png;base64,' } }, /empty/],
    ['invalid_media', { type: 'image_url', image_url: { url: 'data:image/png,abc' } }, /must be base64/],
    ['invalid_media', { type: 'image_url', image_url: { url: 'data:' } }, /has no data/],
    ['invalid_media', { type: 'image_url', image_url: { url: 'ftp://example.com/x.png' } }, /must begin with data:, https:, http: or file:/],
    ['invalid_media', { type: 'image_url', image_url: { url: '/etc/passwd' } }, /must begin with/],
    ['invalid_media', { type: 'image_url', image_url: { url: 'epd:abcd' } }, /epd: URLs/],
    ['invalid_media', { type: 'image_url', image_url: { url: 'file:///etc/passwd' } }, /not allowed/],
    ['media_fetch_failed', { type: 'image_url', image_url: { url: 'http://127.0.0.1:9/x.png' } }, /private or reserved/],
    ['unsupported', { type: 'video_url', video_url: { url: 'https://example.com/x.mp4' } }, /"video_url" are not supported/],
    ['invalid_request', { type: 'hologram', hologram: 'x' }, /"hologram" is unknown/],
    ['invalid_request', { type: 'image_url' }, /must be a string or an object/],
    ['invalid_request', { type: 'image_url', image_url: 7 }, /must be a string or an object/],
    ['invalid_request', 7, /must be a string or an object with a "type"/],
    ['invalid_request', { image: null }, /with a "type"/],
    ['invalid_request', { type: 'input_image', file_id: 'file-1' }, /must be a string or an object with "url"/],
    ['unsupported', { type: 'image_embeds', image_embeds: 'AAAA' }, /"image_embeds" are not supported/],
    ['invalid_request', { type: 'image_url', image_url: { url, max_dynamic_patch: -1 } }, /positive integer/, 'messages[0].content[1].image_url.max_dynamic_patch']
  ]
  for (const [code, part, message, param = 'messages[0].content[1]'] of cases) {
    t.match(await rejection(h.chat([imagePart(png), part])), { status: 400, code, message, param }, `${code} ${String(message)}`)
  }
  const many = await rejection(h.chat(Array.from({ length: 5 }, () => imagePart(png))))
  t.match(many, { status: 400, code: 'invalid_request', param: 'messages[0].content[4]', message: /at most 4/ })
  for (const body of [{}, { messages: 'x' }, { messages: [null] }, null]) {
    t.match(await rejection(h.engine.chat({ body, signal: AbortSignal.any([]), requestId: 'x', context: ROOT_CONTEXT })), { status: 400, code: 'invalid_request' })
  }
  const good = await h.chat([imagePart(png)])
  t.equal(good.length, 1)
  h.ack(good)
  checkIdle(t, h)
})

t.test('memory stays flat over many bad items of every kind, each refused as it should be', async t => {
  const server = createServer((req, res) => {
    if (req.url === '/away') res.writeHead(302, { location: 'http://10.0.0.1/x.png' }).end()
    else res.writeHead(200, { 'content-type': 'image/png' }).end(pngHeader(50_000, 50_000))
  }).listen(0, '127.0.0.1')
  t.teardown(() => { server.closeAllConnections(); server.close() })
  await once(server, 'listening')
  const { port } = server.address() as AddressInfo
  const closed = createServer().listen(0, '127.0.0.1')
  await once(closed, 'listening')
  const nobody = (closed.address() as AddressInfo).port
  await new Promise(resolve => closed.close(resolve))
  // The operator has named this machine as a source; everything else that is private stays refused.
  const h = await harness(t, { maxItems: 4, maxQueue: 64, media: { allowPrivate: false, allowedDomains: ['127.0.0.1'] } })
  const bytes = await picture(1, 300, 300)
  const url = (text: string): object => ({ type: 'image_url', image_url: { url: text } })
  const bad: Array<[unknown[], string]> = [
    [[url(dataUrl(bytes.subarray(0, bytes.length >> 1)))], 'invalid_media'],
    [[url(dataUrl(pngHeader(50_000, 50_000)))], 'invalid_media'],
    [[url(dataUrl(Buffer.from('nothing')))], 'invalid_media'],
    [[url(dataUrl(bytes).slice(0, -9) + '$'.repeat(9))], 'invalid_media'],
    [[url(`http://127.0.0.1:${port}/bomb.png`)], 'invalid_media'],
    [[url(`http://127.0.0.1:${port}/away`)], 'media_fetch_failed'],
    [[url(`http://127.0.0.1:${nobody}/x.png`)], 'media_fetch_failed'],
    [[url('http://169.254.169.254/x.png')], 'media_fetch_failed'],
    [[{ type: 'hologram' }], 'invalid_request'],
    [Array.from({ length: 5 }, () => url(dataUrl(bytes))), 'invalid_request']
  ]
  const send = async (count: number): Promise<void> => {
    for (let i = 0; i < count; i += 10) {
      const answers = await Promise.all(bad.map(([parts]) => rejection(h.chat([imagePart(bytes), ...parts].slice(0, 5)))))
      const wrong = answers.filter(({ status, code, param }, k) => status !== 400 || code !== bad[k]?.[1] || !/^messages\[0\]\.content\[[14]\]/.test(String(param)))
      if (wrong.length > 0) t.fail('not refused as it should be', { wrong })
    }
  }
  await send(100)
  const before = process.memoryUsage().rss
  await send(FULL ? 1000 : 100)
  const grown = process.memoryUsage().rss - before
  t.ok(grown < 40e6, `grew by ${Math.round(grown / 1e6)} MB`)
  await until(() => h.cache.stats.referenced === 0, 'the good item of each request is given back')
  t.equal((await h.chat([imagePart(bytes)]).then(results => { h.ack(results); return results })).length, 1, 'the engine goes on serving')
  checkIdle(t, h)
})

t.test('when there is no room a request waits, and is busy in the end', async t => {
  const h = await harness(t, { blocks: 2, roomTimeoutMs: 50 })
  const held = (await Promise.all([1, 2].map(async seed => await h.chat([imagePart(await picture(seed))])))).flat()
  const err = await rejection(h.chat([imagePart(await picture(3))]))
  t.match(err, { status: 503, code: 'busy', retryAfter: 1, param: 'messages[0].content[0]' })
  const waiting = harnessWait(h, imagePart(await picture(4)))
  await until(() => h.cache.waiting === 1, 'it waits for room')
  h.ack(held)
  const results = await waiting
  t.equal(results.length, 1)
  h.ack(results)
  checkIdle(t, h)
})

async function harnessWait (h: Harness, part: object): Promise<EncoderResultWire[]> {
  for (;;) {
    try { return await h.chat([part]) } catch (err) { if ((err as { code?: string }).code !== 'busy') throw err }
  }
}

t.test('too many waiting items are busy at once', async t => {
  const h = await harness(t, { maxQueue: 2 })
  const parts = await Promise.all([1, 2, 3].map(async seed => imagePart(await picture(seed))))
  t.match(await rejection(h.chat(parts)), { status: 503, code: 'busy' })
  h.ack(await h.chat(parts.slice(0, 2)))
  checkIdle(t, h)
})

t.test('a client that goes away leaves nothing behind, whenever it goes', async t => {
  const h = await harness(t, { width: 256, blocks: 128 })
  const parts = await Promise.all(Array.from({ length: 12 }, async (_, i) => imagePart(await picture(i, 100, 100))))
  const gone = new Error('client gone')
  for (const when of [0, 1, 3, 10, 30]) {
    const stop = new AbortController()
    const calls = parts.map(part => h.chat([part], { signal: stop.signal }).then(() => 'answered', err => err as unknown))
    if (when > 0) await new Promise(resolve => setTimeout(resolve, when))
    stop.abort(gone)
    for (const result of await Promise.all(calls)) if (result !== 'answered') t.equal(result, gone)
    await until(() => h.leases.openCount === 0 && h.cache.stats.referenced === 0 && h.engine.sequences().preprocessing === 0, 'all is given back')
  }
  checkIdle(t, h)
})

t.test('one of several waiting for the same picture may go, the others get it', async t => {
  const h = await harness(t)
  const part = imagePart(await picture(5, 400, 400))
  const stop = new AbortController()
  const leaving = rejection(h.chat([part], { signal: stop.signal }))
  const staying = h.chat([part])
  stop.abort(new Error('bye'))
  t.match(await leaving, { message: 'bye' })
  const again = await h.chat([part])
  const results = await staying
  t.equal(h.counters.encodedItems, 1)
  h.ack([...results, ...again])
  const alone = new AbortController()
  const other = imagePart(await picture(6, 1200, 1200))
  const given = rejection(h.chat([other], { signal: alone.signal }))
  await until(() => h.engine.sequences().preprocessing === 1, 'it is being decoded')
  alone.abort(new Error('bye'))
  t.match(await given, { message: 'bye' })
  h.ack(await h.chat([other]))
  checkIdle(t, h)
})

t.test('a request is aborted by its id, and leases end by session id or lease id', async t => {
  const h = await harness(t)
  const part = imagePart(await picture(5, 1200, 1200))
  const call = rejection(h.chat([part], { requestId: 'me' }))
  await until(() => h.engine.abort('me'), 'the request is known')
  t.match(await call, { code: 'cancelled', status: 499 })
  t.notOk(h.engine.abort('me'))
  const [a, b, c] = (await Promise.all([h.chat([part]), h.chat([part]), h.chat([part], {})])).flat() as [EncoderResultWire, EncoderResultWire, EncoderResultWire]
  await h.chat([part, part], { requestId: 'unread' })
  t.equal(h.leases.openCount, 5)
  t.ok(h.engine.abort('unread'), 'who aborts a request that was answered has not read which leases it got')
  t.notOk(h.engine.abort('unread'))
  h.engine.endSession(a.remote_session_id)
  h.engine.endSession(a.remote_session_id)
  h.engine.endSession(b.lease)
  h.engine.endSession(123456)
  t.equal(h.leases.openCount, 1)
  t.match(h.engine.gauges(), { epd_leases_open: 1, epd_feature_blocks_capacity: 64, epd_feature_blocks_cached: 0 })
  h.ack([c])
  t.equal(h.counters.acks, 1)
  checkIdle(t, h)
})

t.test('an unused lease expires; clearing the cache spares what is held', async t => {
  const h = await harness(t, { leaseMs: 30 })
  const part = imagePart(await picture(1))
  const [result] = await h.chat([part]) as [EncoderResultWire]
  const before = h.features(result)
  h.engine.clearCache()
  t.same(h.features(result), before)
  t.equal(h.cache.stats.referenced, result.remote_block_ids.length)
  await until(() => h.leases.openCount === 0, 'the lease has expired')
  checkIdle(t, h)
})

t.test('preprocessing and encoding are spans under the caller\'s', async t => {
  const exporter = new InMemorySpanExporter()
  let onStart = (): void => {}
  const watcher = { onStart: () => { onStart() }, onEnd () {}, async forceFlush () {}, async shutdown () {} }
  const provider = new BasicTracerProvider({ spanProcessors: [new SimpleSpanProcessor(exporter), watcher] })
  trace.setGlobalTracerProvider(provider)
  t.teardown(async () => { trace.disable(); await provider.shutdown() })
  const h = await harness(t)
  const traceId = '0af7651916cd43dd8448eb211c80319c'
  const context = trace.setSpanContext(ROOT_CONTEXT, { traceId, spanId: 'b7ad6b7169203331', traceFlags: 1, isRemote: true })
  h.ack(await h.chat([imagePart(await picture(1))], { context }))
  await rejection(h.chat([{ type: 'image_url', image_url: { url: dataUrl(pngHeader(50_000, 50_000)) } }], { context }))
  const spans = exporter.getFinishedSpans()
  t.same(spans.map(s => [s.name, s.spanContext().traceId, s.parentSpanContext?.spanId]), ['engine.preprocess', 'engine.encode', 'engine.preprocess'].map(name => [name, traceId, 'b7ad6b7169203331']))
  t.match(spans[1]?.attributes, { 'gen_ai.request.model': 'fake', 'epd.tokens': 20, 'epd.batch': 1 })
  t.match(spans[2], { status: { code: 2, message: /pixels/ }, attributes: { 'error.type': 'invalid_media' } })
  const gone = new AbortController()
  onStart = () => { gone.abort(new EngineError('cancelled', 'The client closed the connection.')) }
  await rejection(h.chat([imagePart(await picture(2))], { context, signal: gone.signal }))
  const left = await until(() => exporter.getFinishedSpans()[3], 'it has ended')
  t.match(left, { name: 'engine.preprocess', status: { code: 0 }, attributes: { 'epd.aborted': true } }, 'a client that leaves is no error')
  t.equal(left.attributes['error.type'], undefined)
})

t.test('what an encoder says of itself', async t => {
  const h = await harness(t)
  const { blockBytes } = featureBlockShape(h.model)
  t.match(h.engine.info(), {
    engine: 'fastify-epd',
    backend: 'pytorch',
    role: 4,
    epoch: 4711,
    model: 'fake',
    vision: 'full',
    produces: ['features:epd-zmq/1'],
    accepts: [],
    block_size: 32,
    num_gpu_blocks: 64,
    fingerprint: h.model.fingerprint,
    feature: { block_tokens: 32, hidden_size: 8, dtype: 'float32', block_bytes: blockBytes, num_blocks: 64 }
  })
  await h.engine.close()
  t.match(await rejection(h.chat([imagePart(await picture(1))])), { code: 'draining', status: 503 })
})

t.test('features pulled over the link are those in the blocks, and the ACK ends the lease', async t => {
  const log = { debug () {}, info () {}, warn () {}, error () {} }
  const engine = await createEncoderEngine({
    engineId: 'http://encoder',
    role: 'encoder',
    backend: 'pytorch',
    modelDir: fakeModel(t.testdir()),
    host: '127.0.0.1',
    device: 'cpu',
    threads: 1,
    vision: true,
    featureBlocks: 16,
    media: { allowPrivate: false, allowedDomains: [] },
    log
  })
  t.teardown(() => engine.close())
  await engine.ready
  const { model } = engine
  const { hiddenSize, dtype, blockBytes } = featureBlockShape(model)
  const pool = new BlockPool({ name: 'feature', numBlocks: 4, blockBytes })
  const consumer = await P2PNode.open({
    engineId: 'http://consumer', epoch: 5, pools: { feature: { pool, shape: { block_tokens: 32, hidden_size: hiddenSize, dtype } } }, leases: new LeaseTable(5), fingerprint: model.fingerprint
  })
  t.teardown(() => consumer.close())
  await consumer.connect(engine.p2p.endpoint as P2PEndpointInfo)
  const bytes = await picture(7, 200, 100)
  const answer = await engine.chat({ body: { messages: [{ role: 'user', content: [imagePart(bytes)] }] }, signal: new AbortController().signal, requestId: 'r', context: ROOT_CONTEXT, consumer: 'http://consumer' })
  const [result] = (answer as { json: { encoder_result: EncoderResultWire[] } }).json.encoder_result as [EncoderResultWire]
  const name = { engineId: result.remote_engine_id, epoch: result.epoch, lease: result.lease }
  const localBlocks = pool.allocate(result.remote_block_ids.length) as number[]
  await consumer.pull({ ...name, pool: 'feature', remoteBlocks: result.remote_block_ids, localBlocks })
  const pulled = Buffer.concat(localBlocks.map(id => pool.bytes(id))).subarray(0, result.num_tokens * hiddenSize * 4)
  t.ok(pulled.equals(await direct(model, bytes)))
  t.match(engine.gauges(), { epd_leases_open: 1 })
  await consumer.ack(name)
  await until(() => engine.gauges().epd_leases_open === 0, 'the ACK has ended the lease')
  t.equal(engine.counters.acks, 1)
  engine.clearCache()
  t.match(engine.gauges(), { epd_feature_blocks_capacity: 16, epd_feature_blocks_free: 16 })
})

t.test('an engine that can\'t be made says why', async (t: Test) => {
  const dir = fakeModel(t.testdir())
  const options = { engineId: 'http://e', role: 'encoder', backend: 'pytorch', host: '127.0.0.1', vision: true, media: { allowPrivate: false, allowedDomains: [] }, log: { debug () {}, info () {}, warn () {}, error () {} } } as const
  await t.rejects(createEncoderEngine({ ...options, modelDir: `${dir}/nowhere`, device: 'cpu' }), { name: 'ModelError', message: /config\.json is missing/ })
  await t.rejects(createEncoderEngine({ ...options, modelDir: dir, device: 'tpu' }), /unknown device "tpu"/)
})
