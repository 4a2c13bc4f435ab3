import { createServer } from 'node:http'
import { once } from 'node:events'
import type { AddressInfo } from 'node:net'
import t from 'tap'
import { ROLE_TO_WIRE, type Adapter, type AdapterNode, type Call, type EncoderResult } from '../../adapters/adapter.ts'
import { adapters, checkAdapter, detectAdapter, openai, pytorch, resolveAdapter, turbomind } from '../../adapters/index.ts'
import { EngineError } from '../../engines/service/errors.ts'
import type { EngineInfo } from '../../engines/service/engine-service.ts'
import { P2PError } from '../../engines/p2p/types.ts'
import { bodyFrom, callWith, dispatcherFor, nodeAt, textOf } from '../helper/adapter-call.ts'
import { FakeLmdeploy, type FakeLmdeployOptions, type Fault } from '../helper/fake-lmdeploy.ts'
import { startScripted } from '../helper/scripted-engine.ts'
import { until } from '../helper/until.ts'

type T = Pick<typeof t, 'teardown'>
const PICTURE = 'data:image/png;base64,AAAA'
const picture = (url = PICTURE): object => ({ type: 'image_url', image_url: { url } })

async function lmdeploy (t: T, options: FakeLmdeployOptions = {}): Promise<FakeLmdeploy> {
  const fake = await FakeLmdeploy.start(options)
  t.teardown(async () => { await fake.close() })
  return fake
}

async function probed (adapter: Adapter, node: AdapterNode, call: Call): Promise<AdapterNode> {
  return { ...node, info: await adapter.probe(node, call) }
}

const failure = async (promise: Promise<unknown>): Promise<unknown> => await promise.then(() => undefined, (error: unknown) => error)

t.test('lmdeploy: probes distinguish its two backends, in both forms of engine_info', async t => {
  const call = callWith(dispatcherFor(t))
  const torch = await lmdeploy(t, { model: 'a' })
  const turbo = await lmdeploy(t, { backend: 'turbomind', model: 'b' })
  const old = await lmdeploy(t, { backend: 'old', model: 'c' })
  t.equal(await detectAdapter(nodeAt(torch.url), call), 'pytorch')
  t.equal(await detectAdapter(nodeAt(turbo.url), call), 'turbomind')
  t.equal(await detectAdapter(nodeAt(old.url), call), 'pytorch')
  t.match(await pytorch.probe(nodeAt(torch.url), call), {
    status: 'healthy', models: ['a'], role: 'hybrid', backend: 'lmdeploy pytorch', produces: [], accepts: [], vision: 'full', notes: [], details: { engine: { num_gpu_blocks: 1234 } }
  })
  t.match(await turbomind.probe(nodeAt(turbo.url), call), { backend: 'lmdeploy turbomind', models: ['b'], accepts: [], notes: [/no feature transfer/] })
  t.match(await pytorch.probe(nodeAt(old.url), call), { notes: [/too old/] })
  t.match(await pytorch.probe(nodeAt(turbo.url), call), { notes: [/name the adapter turbomind/] })
  t.match(await failure(turbomind.probe(nodeAt(torch.url), call)), { code: 'UNAVAILABLE', message: /adapter pytorch/ })
  t.match(await pytorch.probe(nodeAt(old.url, { role: 'prefill' }), call), { role: 'prefill', produces: [], notes: [/too old for disaggregation/] })
})

t.test('a URL that ends in /v1 is that of the server without it, whatever the server', async t => {
  const call = callWith(dispatcherFor(t))
  const engine = await lmdeploy(t, { backend: 'turbomind', model: 'm' })
  const node = nodeAt(`${engine.url}/v1/`)
  t.equal(await detectAdapter(node, call), 'turbomind')
  t.match(await turbomind.probe(node, call), { backend: 'lmdeploy turbomind', models: ['m'] })
  const site = createServer((request, response) => {
    response.end(request.url === '/v1/models' ? JSON.stringify({ data: [{ id: 'gpt', owned_by: 'acme' }] }) : '<!doctype html>')
  }).listen(0, '127.0.0.1')
  t.teardown(() => { site.closeAllConnections(); site.close() })
  await once(site, 'listening')
  const hosted = nodeAt(`http://127.0.0.1:${(site.address() as AddressInfo).port}/v1`)
  t.equal(await detectAdapter(hosted, call), 'openai', 'with a page at every other path')
  t.match(await openai.probe(hosted, call), { status: 'healthy', models: ['gpt'] })
})

t.test('vllm named for another server is noted', async t => {
  const call = callWith(dispatcherFor(t))
  t.match(await adapters.get('vllm')!.probe(nodeAt((await lmdeploy(t)).url), call), { notes: [/is a server of lmdeploy: without adapter in its entry/] })
})

t.test('an engine that refuses its control routes is unavailable for want of a key', async t => {
  const server = createServer((request, response) => {
    if (request.url === '/v1/models') response.end(JSON.stringify({ data: [{ id: 'm', owned_by: 'fastify-epd' }] }))
    else response.writeHead(request.url === '/health' ? 200 : 403).end()
  }).listen(0, '127.0.0.1')
  t.teardown(() => { server.closeAllConnections(); server.close() })
  await once(server, 'listening')
  const node = nodeAt(`http://127.0.0.1:${(server.address() as AddressInfo).port}`)
  for (const ask of [pytorch.probe, detectAdapter]) t.match(await failure(ask(node, callWith(dispatcherFor(t)))), { code: 'UNAVAILABLE', message: /engine_info with 403: start it with --api-key, and set apiKey/ })
})

t.test('lmdeploy: the states of /health', async t => {
  const call = callWith(dispatcherFor(t))
  const fake = await lmdeploy(t)
  fake.health = 'sleeping'
  t.match(await pytorch.probe(nodeAt(fake.url), call), { status: 'sleeping' })
  fake.health = 'initializing'
  t.match(await pytorch.probe(nodeAt(fake.url), call), { status: 'initialising', models: [] })
  t.equal(await detectAdapter(nodeAt(fake.url), call), 'pytorch')
  fake.health = 'unhealthy'
  t.match(await failure(pytorch.probe(nodeAt(fake.url), call)), { code: 'UNAVAILABLE', message: /scheduler tick stalled/ })
  t.match(await openai.probe(nodeAt(fake.url), call), { status: 'healthy' }, 'for openai /health is optional')
  await fake.vanish()
  t.match(await failure(pytorch.probe(nodeAt(fake.url), call)), { code: 'UNAVAILABLE', cause: { code: 'ECONNREFUSED' } })
  await fake.comeBack()
  fake.health = 'healthy'
  t.match(await pytorch.probe(nodeAt(fake.url), call), { status: 'healthy' })
})

t.test('lmdeploy: a member of every object is no state', async t => {
  const fake = await lmdeploy(t)
  fake.health = 'constructor'
  t.match(await failure(pytorch.probe(nodeAt(fake.url), callWith(dispatcherFor(t)))), { code: 'UNAVAILABLE', message: /answered \/health with 503/ })
})

t.test('lmdeploy: a server that drops pictures silently is found out, once, and gets none', async t => {
  const call = callWith(dispatcherFor(t))
  const fake = await lmdeploy(t, { languageModelOnly: true })
  const node = await probed(pytorch, nodeAt(fake.url), call)
  t.match(node.info, { vision: 'none', notes: [/gets no media/] })
  const asked = fake.seen.filter(request => request.method === 'POST').length
  t.equal(asked, 2)
  await pytorch.probe(node, call)
  t.equal(fake.seen.filter(request => request.method === 'POST').length, asked, 'what is known is not asked again')
  const body = await bodyFrom({ model: fake.model, messages: [{ role: 'user', content: [picture()] }] })
  t.match(await failure(pytorch.generate({ node, path: '/v1/chat/completions', body, features: [] }, call)), { code: 'REFUSED', message: /media would be lost/ })
  const text = await bodyFrom({ model: fake.model, messages: [{ role: 'user', content: 'hello' }] })
  t.match(await textOf(await pytorch.generate({ node, path: '/v1/chat/completions', body: text, features: [] }, call)), /I see 0 pictures/)

  const told = await lmdeploy(t, { languageModelOnly: true })
  t.match(await pytorch.probe(nodeAt(told.url, { vision: 'none' }), call), { vision: 'none' })
  t.notOk(told.seen.some(request => request.method === 'POST'), 'the operator\'s word is not checked')
})

t.test('lmdeploy: keys, chat, streams, completions, and what never travels', async t => {
  const call = callWith(dispatcherFor(t))
  const fake = await lmdeploy(t, { apiKey: 'k' })
  t.match(await failure(pytorch.probe(nodeAt(fake.url), call)), { code: 'UNAVAILABLE', message: /401/ })
  const node = await probed(pytorch, nodeAt(fake.url, { apiKey: 'k' }), call)
  const evil = { migration_request: { remote_engine_id: 'x' }, with_cache: true, preserve_cache: true, encoder_result: [] }
  const body = await bodyFrom({ model: fake.model, messages: [{ role: 'user', content: [{ type: 'text', text: 'hi' }, picture(), { type: 'image_data', image_data: PICTURE }] }], ...evil })
  t.match(JSON.parse(await textOf(await pytorch.generate({ node, path: '/v1/chat/completions', body, features: [] }, call))), { choices: [{ message: { content: 'I see 2 pictures.' } }] })
  t.same(Object.keys(fake.generations()[0]!.body!), ['model', 'messages'], 'control fields of a client stay here: a migration sent to a hybrid hangs for ever')
  fake.faults.push({ kind: 'split', bytes: 7 })
  const streamed = await bodyFrom({ model: fake.model, messages: [{ role: 'user', content: 'hi' }], stream: true })
  const text = await textOf(await pytorch.generate({ node, path: '/v1/chat/completions', body: streamed, features: [] }, call))
  t.match(text, /"content":"I".*"content":" 0 pictures|data: \[DONE\]/s)
  const wrong = await bodyFrom({ model: 'other', messages: [{ role: 'user', content: 'hi' }] })
  t.match(await failure(pytorch.generate({ node, path: '/v1/chat/completions', body: wrong, features: [] }, call)), { code: 'REJECTED', response: { statusCode: 404, body: /does not exist/ } })
})

t.test('lmdeploy: every scripted fault before the first event is an error of its kind, and nothing stays open', async t => {
  const dispatcher = dispatcherFor(t)
  const fake = await lmdeploy(t)
  const node = await probed(pytorch, nodeAt(fake.url), callWith(dispatcher))
  const body = await bodyFrom({ model: fake.model, messages: [{ role: 'user', content: 'hi' }], stream: true })
  const meet = async (fault: Fault, signal?: AbortSignal): Promise<unknown> => {
    fake.faults.push(fault)
    return await failure(pytorch.generate({ node, path: '/v1/chat/completions', body, features: [] }, callWith(dispatcher, signal === undefined ? {} : { signal })))
  }
  for (const kind of ['reset', 'head-then-reset', 'half-event-then-reset', 'empty-stream'] as const) t.match(await meet({ kind }), { code: 'UNAVAILABLE' }, kind)
  t.match(await meet({ kind: 'status', status: 503, headers: { 'retry-after': '3' } }), { code: 'BUSY', retryAfter: 3 })
  t.match(await meet({ kind: 'status', status: 499 }), { code: 'UNAVAILABLE' })
  t.match(await meet({ kind: 'status', status: 409 }), { code: 'REJECTED' })
  t.match(await meet({ kind: 'error-event', error: { message: 'bad', code: 400 } }), { code: 'REJECTED' })
  for (const kind of ['silence', 'head-then-silence', 'half-event-then-silence'] as const) {
    const controller = new AbortController()
    const count = fake.seen.length
    const met = meet({ kind }, controller.signal)
    await until(() => fake.seen.length > count, 'the request is there')
    controller.abort(new Error('stage timeout'))
    t.match(await met, { message: 'stage timeout' }, kind)
    await until(() => fake.seen.at(-1)!.aborted, 'lmdeploy sees the connection go, and ends the session')
  }
  await until(() => fake.connections <= 2, 'nothing is open but what is kept to be used again')
})

t.test('our engines: probes report role, epoch, formats, and the TurboMind kind', async t => {
  const call = callWith(dispatcherFor(t))
  const e = await startScripted(t, 'encoder')
  const pd = await startScripted(t, 'hybrid')
  t.match(await pytorch.probe(nodeAt(e.url, { role: 'encoder' }), call), {
    status: 'healthy', role: 'encoder', models: ['fake-vlm'], epoch: 4711, fingerprint: 'f'.repeat(64), produces: ['features:epd-zmq/1'], vision: 'full', backend: 'fastify-epd/0.0.0 pytorch', notes: []
  })
  t.match(await pytorch.probe(nodeAt(pd.url, { role: 'encoder' }), call), { role: 'hybrid', accepts: ['features:epd-zmq/1'], vision: 'features', notes: [/registered as encoder, says it is hybrid/] })
  pd.engine.more = { role: ROLE_TO_WIRE.prefill }
  t.match(await pytorch.probe(nodeAt(pd.url, { role: 'prefill' }), call), { role: 'prefill', produces: ['kv:epd-zmq/1'], notes: [] })
  pd.engine.more = { backend: 'turbomind', vision: 'full' }
  t.equal(await detectAdapter(nodeAt(pd.url), call), 'turbomind')
  t.match(await turbomind.probe(nodeAt(pd.url), call), { vision: 'full', accepts: ['features:epd-zmq/1'], notes: [] })
  t.match(await pytorch.probe(nodeAt(pd.url), call), { accepts: [], notes: [/name the adapter turbomind/] })
})

t.test('our engines: a link is four calls, infos go through as they are, and mismatches are refused with the reason', async t => {
  const call = callWith(dispatcherFor(t))
  const e = await startScripted(t, 'encoder')
  const pd = await startScripted(t, 'hybrid')
  const [a, b] = [nodeAt(e.url, { role: 'encoder' }), nodeAt(pd.url)]
  t.same(await pytorch.link(a, b, call), { from: e.url, to: pd.url, transport: 'zmq+tcp', epochs: [4711, 4711] })
  t.same(e.engine.linked, [pd.engine.p2p.endpoint])
  t.same(pd.engine.linked, [e.engine.p2p.endpoint])
  await pytorch.unlink!(a, b, call)
  t.same([e.engine.dropped.length, pd.engine.dropped.length], [1, 1])

  pd.engine.connecting = async () => { throw new P2PError('TIMEOUT', 'the peer did not answer') }
  t.match(await failure(pytorch.link(a, b, call)), { code: 'UNAVAILABLE', message: /the peer did not answer/ })
  t.same([e.engine.dropped.length, pd.engine.dropped.length], [2, 2], 'half a link is undone on both ends')

  const refused = async (more: Partial<EngineInfo>, reason: RegExp): Promise<void> => {
    pd.engine.more = more
    t.match(await failure(pytorch.link(a, b, call)), { code: 'REFUSED', message: reason })
  }
  e.engine.more = { feature: { hidden_size: 256, dtype: 'float32' } }
  await refused({ fingerprint: 'other' }, /models or processors differ/)
  await refused({ accepts: ['features:epd-zmq/2'] }, /no transfer format in common/)
  await refused({ feature: { hidden_size: 512, dtype: 'float32' } }, /hidden_size \(256 and 512\)/)
  const real = await lmdeploy(t)
  t.match(await failure(pytorch.link(a, nodeAt(real.url), call)), { code: 'REFUSED', message: /knows no encoder role/ })
})

/** What our encoder answers for the media parts it got. */
function encodeAnswer (body: unknown): { status: number, json: unknown } {
  const { messages } = body as { messages: Array<{ content: unknown[] }> }
  const results = messages.flatMap((message, m) => message.content.map((_part, p) => ({
    message: m, part: p, lease: `lease${m}${p}`, num_tokens: 80, cached: p === 1, remote_session_id: 10 * m + p, remote_block_ids: [p], epoch: 4711
  })))
  return { status: 200, json: { object: 'encoder.result', encoder_result: results } }
}

const CONVERSATION = {
  model: 'fake-vlm',
  messages: [
    { role: 'system', content: 'be brief' },
    { role: 'user', content: [{ type: 'text', text: 'one' }, picture('data:image/png;base64,AAAA'), { type: 'text', text: 'two' }, picture('data:image/png;base64,BBBB')] },
    { role: 'assistant', content: 'ok' },
    { role: 'user', content: [picture('data:image/png;base64,CCCC')] }
  ]
}

t.test('our engines: an encode call carries the media alone, and results find their way back to the client\'s positions', async t => {
  const call = callWith(dispatcherFor(t))
  const e = await startScripted(t, 'encoder')
  e.engine.answer = async ({ body, ahead }) => ahead === true ? { status: 200, json: {} } : encodeAnswer(body)
  const node = await probed(pytorch, nodeAt(e.url, { role: 'encoder' }), call)
  const body = await bodyFrom(CONVERSATION)
  const job = { node, items: body.media, body, consumer: nodeAt('http://pd'), tenant: 'acme' }
  const results = await pytorch.encode(job, call)
  t.match(results, [
    { item: 0, node: e.url, lease: 'lease00', tokens: 80, cached: false, wire: { message: 1, part: 1 } },
    { item: 1, lease: 'lease01', cached: true, wire: { message: 1, part: 3 } },
    { item: 2, lease: 'lease10', wire: { message: 3, part: 0 } }
  ])
  const sent = e.engine.calls[0]!
  t.equal(sent.tenant, 'acme')
  t.match(sent.body, { model: 'fake-vlm', messages: [{ role: 'user' }, { role: 'user' }] })
  t.notMatch(JSON.stringify(sent.body), /one|be brief/)

  let n = 0
  for (const overlap of ['r1', undefined]) {
    for (const pullsAhead of [true, false, undefined]) {
      const consumer = { ...job.consumer, info: { ...node.info!, details: { server: 'epd', engine: { pulls_ahead: pullsAhead } } } }
      await pytorch.encode({ ...job, consumer, overlap }, call)
      t.equal(e.engine.calls.at(-1)!.overlap, pullsAhead === true && overlap !== undefined ? 'r1:0,1,2' : undefined, 'the encoder may offer only what is wanted and can be taken')
      const told = e.engine.calls.length
      await pytorch.prepare!({ node: { ...consumer, url: e.url }, path: '/v1/chat/completions', body, tenant: 'acme' }, call)
      t.equal(e.engine.calls.length - told, pullsAhead === true ? 1 : 0, 'an engine that pulls nothing ahead is told nothing')
      if (pullsAhead !== true) continue
      t.match(e.engine.calls.at(-1)!, { ahead: true, tenant: 'acme' })
      t.same((e.engine.calls.at(-1)!.body as typeof CONVERSATION).messages, JSON.parse(JSON.stringify(CONVERSATION.messages).replace(/data:image\/png;base64,[ABC]+/g, () => `epd:${n++ % 3}`)), 'the text, and no pixels')
    }
  }

  const one = await pytorch.encode({ ...job, items: [body.media[2]!] }, call)
  t.match(one, [{ item: 2, lease: 'lease00', wire: { message: 3, part: 0 } }])

  await pytorch.release(results.map(({ lease, wire }) => ({ node, lease, wire })), call)
  t.same(e.engine.ended.sort(), ['lease00', 'lease01', 'lease10'], 'by lease: session numbers begin anew with each process')
  await pytorch.release([{ node: nodeAt('http://127.0.0.1:9'), lease: 'x', wire: {} }], call)
  await pytorch.abort(node, 'nobody', call)
})

t.test('our engines: a bad picture is reported by the client\'s position; a wrong answer is no result', async t => {
  const call = callWith(dispatcherFor(t))
  const e = await startScripted(t, 'encoder')
  const node = nodeAt(e.url, { role: 'encoder' })
  const body = await bodyFrom(CONVERSATION)
  const job = { node, items: body.media.slice(1), body, consumer: node }
  e.engine.answer = async () => { throw new EngineError('invalid_media', 'messages[1].content[0] is no picture', { param: 'messages[1].content[0]' }) }
  const error = await failure(pytorch.encode(job, call)) as { code: string, response: { statusCode: number, body: Buffer } }
  t.equal(error.code, 'REJECTED')
  t.match(JSON.parse(error.response.body.toString()), { error: { message: 'messages[3].content[0] is no picture', code: 'invalid_media', param: 'messages[3].content[0]' } })
  e.engine.answer = async () => { throw new EngineError('busy', 'no room', { retryAfter: 2 }) }
  t.match(await failure(pytorch.encode(job, call)), { code: 'BUSY', retryAfter: 2 })
  for (const json of [null, { encoder_result: null }, { encoder_result: [null, null] }, { encoder_result: [0, 1].map(message => ({ message, part: 0, lease: 'x', num_tokens: -1 })) }, { encoder_result: [0, 1].map(message => ({ message, part: 0, lease: 'x', num_tokens: 1, remote_block_ids: ['?'] })) }, { choices: [] }, { encoder_result: [{ message: 0, part: 0, lease: 'x', num_tokens: 1 }] }, { encoder_result: [{ message: 1, part: 0, lease: 'x', num_tokens: 1 }, { message: 0, part: 0, lease: 'y', num_tokens: 1 }] }]) {
    e.engine.answer = async () => ({ status: 200, json })
    t.match(await failure(pytorch.encode(job, call)), { code: 'UNAVAILABLE', message: /no encoder result/ })
  }
})

t.test('our engines: the answering node gets results and leases in place of pixels, and says when they are gone', async t => {
  const call = callWith(dispatcherFor(t))
  const pd = await startScripted(t, 'hybrid')
  const node = await probed(pytorch, nodeAt(pd.url), call)
  const body = await bodyFrom(CONVERSATION)
  const features: EncoderResult[] = [2, 0, 1].map(item => ({ item, node: 'http://e', lease: `l${item}`, tokens: 1, cached: false, wire: { lease: `l${item}`, message: 1, part: item } }))
  const job = { node, path: '/v1/chat/completions', body, features }
  t.equal(await textOf(await pytorch.generate(job, call)), '{"object":"chat.completion","choices":[{"index":0,"message":{"role":"assistant","content":""},"finish_reason":"stop"}]}')
  const sent = pd.engine.calls[0]!.body as typeof CONVERSATION & { encoder_result: Array<{ lease: string }> }
  t.same(sent.encoder_result.map(result => result.lease), ['l0', 'l1', 'l2'])
  t.same(sent.messages[0], CONVERSATION.messages[0])
  t.match(JSON.stringify(sent.messages), /epd:l0.*epd:l1.*epd:l2/)
  t.notMatch(JSON.stringify(sent.messages), /base64/)

  pd.engine.answer = async () => ({ status: 400, json: { error: { message: 'no list of block ids', type: 'x', code: 'invalid_request', param: 'encoder_result[1].remote_block_ids' } } })
  const wrong = features.map(feature => ({ ...feature, node: `http://e${feature.item}` }))
  t.match(await failure(pytorch.generate({ ...job, features: wrong }, call)), { code: 'FEATURES_GONE', producer: 'http://e1' }, 'what an encoder has answered is not the client\'s fault')

  t.match(await failure(pytorch.generate({ ...job, features: features.slice(1) }, call)), { code: 'REFUSED', message: /1 media items are not encoded/ })
  t.match(await failure(pytorch.generate({ ...job, features: [] }, call)), { code: 'REFUSED' }, 'no pixels to a node without vision weights')
  for (const [code, expected] of [['features_gone', { code: 'FEATURES_GONE', unlinked: true }], ['not_linked', { code: 'FEATURES_GONE', unlinked: true }], ['features_corrupt', { code: 'FEATURES_GONE', unlinked: false }], ['invalid_request', { code: 'REJECTED' }], ['internal', { code: 'UNAVAILABLE' }]] as const) {
    pd.engine.answer = async () => { throw new EngineError(code, 'why') }
    t.match(await failure(pytorch.generate(job, call)), expected, code)
    pd.engine.answer = async () => ({ status: 200, stream: (async function * () { yield Buffer.from(`data: ${JSON.stringify({ error: { message: 'why', code, type: 'x' } })}\n\n`) })() })
    t.match((await failure(pytorch.generate(job, call)) as { code: string } | undefined)?.code, code === 'invalid_request' ? /./ : expected.code, `${code} as first event`)
  }
  t.match(await failure(pytorch.generate({ ...job, handoff: { node: 'p', lease: 'l', wire: {} } }, call)), { code: 'REFUSED' })
})

t.test('what an adapter does not speak it refuses with a reason', async t => {
  const call = callWith(dispatcherFor(t))
  const node = nodeAt('http://127.0.0.1:9')
  const body = await bodyFrom({ model: 'm', messages: [] })
  for (const adapter of adapters.values()) {
    t.match(await failure(adapter.prefill({ node, decode: node, body, features: [] }, call)), { code: 'REFUSED', message: /hands no KV blocks on|no disaggregated prefill|does no disaggregation|stay on one node/ })
  }
  const turbo = await lmdeploy(t, { backend: 'turbomind', model: 'm' })
  t.match(await failure(turbomind.link(nodeAt(turbo.url), nodeAt(turbo.url), call)), { code: 'REFUSED', message: /knows no encoder role/ })
  t.match(await failure(openai.link(node, node, call)), { code: 'REFUSED' })
  const info = await turbomind.probe(nodeAt(turbo.url), call)
  for (const [adapter, node] of [[turbomind, nodeAt(turbo.url, { info })], [openai, nodeAt('http://127.0.0.1:9')]] as const) {
    t.match(await failure(adapter.encode({ node, items: [], body, consumer: node }, call)), { code: 'REFUSED' })
    t.match(await failure(adapter.generate({ node, path: '/', body, features: [{ item: 0, node: 'e', lease: 'l', tokens: 1, cached: false, wire: {} }] }, call)), { code: 'REFUSED', message: /no encoder results/ })
    await adapter.release([], call)
    await adapter.abort(node, 'x', call)
  }
})

t.test('openai: any server that lists its models', async t => {
  const call = callWith(dispatcherFor(t))
  const server = createServer((request, response) => {
    if (request.url === '/v1/models') response.end(JSON.stringify({ data: [{ id: 'gpt', owned_by: 'acme' }, { id: 'gpt' }, {}] }))
    else response.writeHead(request.url === '/distserve/engine_info' ? 500 : 405).end()
  }).listen(0, '127.0.0.1')
  t.teardown(() => { server.closeAllConnections(); server.close() })
  await once(server, 'listening')
  const node = nodeAt(`http://127.0.0.1:${(server.address() as AddressInfo).port}`)
  t.equal(await detectAdapter(node, call), 'openai')
  t.match(await openai.probe({ ...node, role: 'decode' }, call), { status: 'healthy', models: ['gpt'], vision: 'full', backend: 'openai (acme)', notes: [/no disaggregation/] })
})

t.test('adapters are found by name or taken as values, and checked', async t => {
  t.equal(resolveAdapter('pytorch'), pytorch)
  const own: Adapter = { ...openai, name: 'openai' }
  t.equal(resolveAdapter('openai', [own]), own, 'one\'s own comes first')
  t.equal(resolveAdapter(own), own)
  t.throws(() => resolveAdapter('nope', [{ ...openai, name: 'mine' }]), /unknown adapter "nope"; known are mine, pytorch, turbomind, vllm, sglang, openai/)
  for (const [change, message] of [[{ name: '' }, /name/], [{ specificationVersion: 'v2' }, /'v1'/], [{ generate: undefined }, /generate must be a function/]] as const) {
    t.throws(() => { checkAdapter({ ...openai, ...change }) }, message)
  }
  t.throws(() => { checkAdapter(null) }, /object/)
})
