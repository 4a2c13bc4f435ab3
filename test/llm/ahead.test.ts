/** Features that are pulled while the encoder works. Whatever becomes of the offers, the answer is the same and nothing is left. */
import { propagation, ROOT_CONTEXT, trace, TraceFlags } from '@opentelemetry/api'
import { W3CTraceContextPropagator } from '@opentelemetry/core'
import { BasicTracerProvider, InMemorySpanExporter, SimpleSpanProcessor } from '@opentelemetry/sdk-trace-base'
import t, { type Test } from 'tap'
import { Dealer } from 'zeromq'
import type { EncoderResultWire } from '../../adapters/wire/results.ts'
import type { EncoderEngine } from '../../engines/encoder/index.ts'
import type { LlmService } from '../../engines/llm/index.ts'
import { deferred } from '../../engines/service/waiting.ts'
import { drawScene } from '../helper/scenes.ts'
import { slowPicture } from '../helper/slow-picture.ts'
import { until } from '../helper/until.ts'
import { KEYS } from '../p2p/keys.ts'
import { ForgedProducer } from './forged-producer.ts'
import { ask, askByEncoder, checkIdle, encode, endpointOf, failure, link, startEncoder, startLlm, withResults } from './harness.ts'

const QUESTION = 'How many shapes are there?'
const GREEDY = { temperature: 0, max_tokens: 12 }
const media = { allowPrivate: true, allowedDomains: [] }

/** Linked both ways, as a gateway's handshake does it. */
async function pair (t: Test, options: Parameters<typeof startLlm>[1] = {}, tuning: Parameters<typeof startLlm>[2] = {}): Promise<{ encoder: EncoderEngine, engine: LlmService }> {
  const [encoder, engine] = await Promise.all([startEncoder(t, { media }), startLlm(t, { vision: false, ...options }, tuning)])
  await link(engine, encoder)
  await encoder.p2p.connect(endpointOf(engine))
  return { encoder, engine }
}

/** All is given back, also what was pulled for a request that did not come. */
async function atRest (t: Test, engine: LlmService, encoder: EncoderEngine): Promise<void> {
  await until(() => [engine, encoder].every(one => {
    const { epd_feature_blocks_free: free = 0, epd_feature_blocks_cached: cached = 0, epd_feature_blocks_capacity: all } = one.gauges()
    return free + cached === all && one.gauges().epd_leases_open === 0
  }), 'no block is held')
  await checkIdle(t, engine, encoder)
}

const overlapping = (engine: LlmService): { consumer: string, overlap: string } => ({ consumer: endpointOf(engine).engine, overlap: 'its-request:0,1,2' })

t.test('features are pulled before the call is answered, and the request finds them', async t => {
  const { encoder, engine } = await pair(t)
  const urls = await Promise.all([1, 2, 3].map(drawScene))
  const expected = await askByEncoder(encoder, engine, urls, QUESTION, GREEDY)
  t.same(engine.counters.ahead, { pulled: 0, used: 0, dropped: 0 }, 'none is offered that is not to be')
  await atRest(t, engine, encoder)

  const slow = await slowPicture(t, urls[2]!)
  const call = encode(encoder, [urls[0]!, urls[1]!, slow.url], overlapping(engine))
  await until(() => engine.counters.ahead.pulled === 2, 'two items are pulled while the third is not there')
  t.equal(engine.gauges().epd_leases_open, 0)
  const before = engine.counters.migratedBytes
  slow.send()
  const results = await call
  const answer = await ask(engine, withResults(results, QUESTION, GREEDY))
  t.same(answer.choices, expected.choices)
  t.ok(engine.counters.ahead.used >= 2)
  t.equal(engine.counters.migratedBytes - before, results[2]!.num_tokens * results[2]!.hidden_size * 4, 'the two are not pulled again')
  t.equal(encoder.counters.acks, 6, 'the answer\'s leases were ACKed')
  await atRest(t, engine, encoder)
})

t.test('offers go over links with CURVE too, of one key pair and of two', async t => {
  const urls = await Promise.all([61, 62].map(drawScene))
  const [one, two] = KEYS
  for (const [here, there] of [[{ curve: one }, { curve: one }], [{ curve: one, allowedPeers: [two.publicKey] }, { curve: two, allowedPeers: [one.publicKey] }]] as const) {
    const [encoder, engine] = await Promise.all([startEncoder(t, { media, ...here }), startLlm(t, { vision: false, ...there })])
    await link(engine, encoder)
    await encoder.p2p.connect(endpointOf(engine))
    t.same(engine.p2p.peers().map(({ encrypted }) => encrypted), [true])
    const slow = await slowPicture(t, urls[1]!)
    const call = encode(encoder, [urls[0]!, slow.url], overlapping(engine))
    await until(() => engine.counters.ahead.pulled === 1, 'the first item is pulled')
    slow.send()
    const answer = await ask(engine, withResults(await call, QUESTION, GREEDY))
    t.ok(engine.counters.ahead.used >= 1)
    await atRest(t, engine, encoder)
    t.same(answer.choices, (await askByEncoder(encoder, engine, urls, QUESTION, GREEDY)).choices)
    await atRest(t, engine, encoder)
  }
})

const OTHER = 'ffffffffffffffff'
type Send = (engineId: string, lease: string) => void
const DELIVERIES: ReadonlyArray<{ title: string, deliver: (send: Send, engineId: string, lease: string, later: Array<() => void>) => void }> = [
  { title: 'lost', deliver: () => {} },
  { title: 'late, after the request', deliver: (send, engineId, lease, later) => { later.push(() => { send(engineId, lease) }) } },
  { title: 'twice', deliver: (send, engineId, lease) => { send(engineId, lease); send(engineId, lease) } },
  { title: 'of another lease', deliver: (send, engineId) => { send(engineId, OTHER) } },
  { title: 'to another engine', deliver: (send, _engineId, lease) => { send('http://another', lease) } },
  { title: 'many times more than are taken', deliver: (send, engineId, lease) => { for (let i = 0; i < 40; i++) send(engineId, i % 2 === 0 ? lease : OTHER) } }
]

t.test('offers that are lost, late, repeated or wrong change no answer', async t => {
  const { encoder, engine } = await pair(t)
  const urls = await Promise.all([11, 12].map(drawScene))
  const expected = await askByEncoder(encoder, engine, urls, QUESTION, GREEDY)
  const send = encoder.p2p.offer!.bind(encoder.p2p)
  for (const { title, deliver } of DELIVERIES) {
    await t.test(title, async t => {
      await atRest(t, engine, encoder)
      const later: Array<() => void> = []
      encoder.p2p.offer = (engineId, lease) => { deliver(send, engineId, lease, later) }
      const answer = await ask(engine, withResults(await encode(encoder, urls, overlapping(engine)), QUESTION, GREEDY))
      for (const offer of later) offer()
      t.same(answer.choices, expected.choices)
      await atRest(t, engine, encoder)
    })
  }
  encoder.p2p.offer = send
})

t.test('a call that fails, is aborted or left by its caller leaves nothing at either end', async t => {
  const { encoder, engine } = await pair(t)
  const url = await drawScene(21)
  for (const how of ['fails', 'aborted', 'left'] as const) {
    const slow = await slowPicture(t, url)
    const caller = new AbortController()
    const { pulled } = engine.counters.ahead
    const call = failure(encode(encoder, [await drawScene(22 + pulled), slow.url], { ...overlapping(engine), requestId: how, signal: caller.signal })).catch(() => undefined)
    await until(() => engine.counters.ahead.pulled > pulled, 'the first item is pulled')
    if (how === 'fails') slow.send(Buffer.from('no picture'))
    if (how === 'aborted') encoder.abort(how)
    if (how === 'left') caller.abort()
    const failed = await call
    if (how === 'fails') t.match(failed, { code: 'invalid_media' })
    await atRest(t, engine, encoder)
  }
})

t.test('blocks that wait for an encoder give way to a request, and are free when the encoder has gone', async t => {
  const url = await drawScene(31)
  const small = { featureBlocks: 5 }
  const { encoder, engine } = await pair(t, small)
  const [honest] = await encode(encoder, [url]) as [EncoderResultWire]
  const needed = honest.remote_block_ids.length
  t.ok(needed > 2 && needed <= small.featureBlocks, 'two such items have no room')
  const expected = await ask(engine, withResults([honest], QUESTION, GREEDY))
  await atRest(t, engine, encoder)
  const free = (): number | undefined => engine.gauges().epd_feature_blocks_free

  const never = deferred<void>()
  const forger = await ForgedProducer.link(t, engine, 'feature')
  const parked = forger.ahead(engine, honest, never.promise)
  await until(() => free() === small.featureBlocks - needed, 'an item waits for its encoder')
  const answer = await askByEncoder(encoder, engine, [url], QUESTION, GREEDY)
  t.same(answer.choices, expected.choices, 'the request had the room')
  t.equal(engine.counters.ahead.dropped, 1)
  forger.end(parked)
  await atRest(t, engine, encoder)

  const again = forger.ahead(engine, honest, never.promise)
  await until(() => free() === small.featureBlocks - needed, 'an item waits again')
  await forger.close()
  await until(() => free() === small.featureBlocks, 'its blocks are free')
  t.equal(engine.counters.ahead.dropped, 2)
  forger.end(again)
  never.resolve()
  await atRest(t, engine, encoder)
})

t.test('bursts of requests that have room for one at a time are served', async t => {
  const { encoder, engine } = await pair(t, { featureBlocks: 9 })
  const urls = await Promise.all(Array.from({ length: 40 }, async (_, i) => await drawScene(100 + i)))
  const sizes = await encode(encoder, urls)
  for (const { lease } of sizes) encoder.endSession(lease)
  const large = urls.filter((_, i) => sizes[i]!.remote_block_ids.length === 3)
  t.ok(large.length >= 12)
  for (let burst = 0; burst < 3; burst++) {
    for (const one of [encoder, engine]) one.clearCache()
    const served = await Promise.all([0, 3, 6, 9].map(async at => await failure(ask(engine, withResults(await encode(encoder, large.slice(at, at + 3), overlapping(engine)), QUESTION, GREEDY)))))
    t.same(served, [undefined, undefined, undefined, undefined])
    await until(() => engine.gauges().epd_leases_open === 0, 'it is over')
  }
  const { used, pulled } = engine.counters.ahead
  t.ok(used <= pulled, `${used} of ${pulled}`)
  await atRest(t, engine, encoder)
})

t.test('an encoder that fills none of its offers takes no place of another, and holds up no request', async t => {
  const { encoder, engine } = await pair(t, {}, { pullTimeoutMs: 600_000 })
  const [honest] = await encode(encoder, [await drawScene(36)]) as [EncoderResultWire]
  const { ahead } = engine.counters
  const forger = await ForgedProducer.link(t, engine, 'feature')
  const never = deferred<void>()
  const parked = Array.from({ length: 12 }, (_, i) => forger.ahead(engine, honest, never.promise, { content_hash: `h${i}` }))
  await until(() => ahead.dropped === 4, 'half of the places are its own, and it gets no more')
  const results = await encode(encoder, [await drawScene(37)], overlapping(engine))
  await until(() => ahead.pulled === 1, 'those of another are pulled')
  const answer = await ask(engine, withResults([forger.result(honest, values => { values.fill(0.5) }, 'h0')], QUESTION, GREEDY))
  t.equal(answer.choices.length, 1)
  t.equal(ahead.dropped, 5, 'the pull ahead that nothing came of has ended')
  for (const lease of parked) forger.end(lease)
  for (const { lease } of [honest, ...results]) encoder.endSession(lease)
  never.resolve()
  await atRest(t, engine, encoder)
})

t.test('what an offer says is checked, and strangers hold nothing', async t => {
  const { encoder, engine } = await pair(t)
  const [honest] = await encode(encoder, [await drawScene(41)]) as [EncoderResultWire]
  const forger = await ForgedProducer.link(t, engine, 'feature')
  const { ahead } = engine.counters
  const lies: object[] = [
    { remote_engine_id: encoder.p2p.endpoint && endpointOf(encoder).engine }, { lease: OTHER }, { num_tokens: 0 }, { num_tokens: 1e9 }, { hidden_size: 1 }, { dtype: 'int8' }, { grid: [7, 9] },
    { content_hash: 7 }, { remote_block_ids: [] }, { remote_block_ids: 'x' }, { epoch: -1 }, { modality: 'audio' }
  ]
  for (const [i, told] of lies.entries()) {
    const lease = forger.ahead(engine, honest, Promise.resolve(), told)
    await until(() => ahead.dropped === i + 1, `refused: ${JSON.stringify(told)}`)
    forger.end(lease)
  }
  t.equal(ahead.pulled, 0)

  const socket = new Dealer({ linger: 0, sendTimeout: 2000 })
  t.teardown(() => { socket.close() })
  const { tcp, engine: id, epoch } = endpointOf(engine)
  socket.connect(tcp)
  const strangers = 200
  for (let i = 0; i < strangers; i++) {
    const from = i % 3 === 0 ? 'http://unknown' : endpointOf(encoder).engine
    await socket.send(JSON.stringify({ v: 1, type: 'offer', id: `s${i}`, from, engine: id, epoch, link: epoch, lease: i % 2 === 0 ? honest.lease : OTHER }))
  }
  await until(() => ahead.dropped + engine.p2p.refused.flood === lies.length + strangers, 'all are dropped: the encoder offers none of them')
  t.equal(ahead.pulled, 0)
  t.equal((await ask(engine, withResults([honest], QUESTION, GREEDY))).choices.length, 1, 'the lease that a stranger has named is whole')
  await atRest(t, engine, encoder)
})

t.test('the trace shows what was pulled while the encoder worked', async t => {
  const exporter = new InMemorySpanExporter()
  trace.setGlobalTracerProvider(new BasicTracerProvider({ spanProcessors: [new SimpleSpanProcessor(exporter)] }))
  propagation.setGlobalPropagator(new W3CTraceContextPropagator())
  t.teardown(() => { trace.disable(); propagation.disable() })
  const { encoder, engine } = await pair(t)
  const parent = { traceId: '0af7651916cd43dd8448eb211c80319c', spanId: 'b7ad6b7169203331', traceFlags: TraceFlags.SAMPLED, isRemote: true }
  const context = trace.setSpanContext(ROOT_CONTEXT, parent)
  const slow = await slowPicture(t, await drawScene(52))
  const call = encode(encoder, [await drawScene(51), slow.url], { ...overlapping(engine), context })
  await until(() => engine.counters.ahead.pulled === 1, 'the first is pulled')
  slow.send()
  const results = await call
  await ask(engine, withResults(results, QUESTION, GREEDY), { context })
  const spans = exporter.getFinishedSpans()
  const ahead = spans.find(({ name }) => name === 'engine.ahead')
  t.match(ahead?.parentSpanContext, { traceId: parent.traceId, spanId: parent.spanId })
  t.match(ahead?.attributes, { 'epd.pool': 'feature', 'epd.bytes': results[0]!.num_tokens * 1024, 'epd.blocks': results[0]!.remote_block_ids.length, 'epd.peer': endpointOf(encoder).engine, 'epd.link': /ipc|tcp/, 'epd.cached': 0 })
  const migrated = spans.find(({ name }) => name === 'engine.migrate')?.attributes as Record<string, number>
  t.ok(migrated['epd.ahead']! >= 1 && migrated['epd.cached']! >= migrated['epd.ahead']!)
  await atRest(t, engine, encoder)
})
