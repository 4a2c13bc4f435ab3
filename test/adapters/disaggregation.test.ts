import t, { type Test } from 'tap'
import type { AdapterNode, Call, Handoff } from '../../adapters/adapter.ts'
import { pytorch } from '../../adapters/index.ts'
import { EngineError } from '../../engines/service/errors.ts'
import type { EngineRole } from '../../engines/service/engine-service.ts'
import type { EpdOptions } from '../../plugin/index.ts'
import { bodyFrom, callWith, dispatcherFor, nodeAt, textOf } from '../helper/adapter-call.ts'
import { ENDS_AT_ONCE, type Generation } from '../helper/fake-distserve.ts'
import { buildGateway, post, type FakeGateway } from '../helper/fake-gateway.ts'
import { FakeLmdeploy, type FakeLmdeployOptions } from '../helper/fake-lmdeploy.ts'
import { startScripted, type ScriptedEngine } from '../helper/scripted-engine.ts'
import { until } from '../helper/until.ts'

/** The pytorch adapter's P and D calls, against each generation of LMDeploy's api_server and against ours. */

type T = Pick<Test, 'teardown'>
const CHAT = '/v1/chat/completions'
const PICTURE = { type: 'image_url', image_url: { url: 'data:image/png;base64,AAAA' } }
const failure = async (promise: Promise<unknown>): Promise<unknown> => await promise.then(() => undefined, (error: unknown) => error)

async function lmdeploy (t: T, options: FakeLmdeployOptions = {}): Promise<FakeLmdeploy> {
  const fake = await FakeLmdeploy.start({ model: 'm', ...options })
  t.teardown(async () => { await fake.close() })
  return fake
}

async function probed (node: AdapterNode, call: Call): Promise<AdapterNode> {
  return { ...node, info: await pytorch.probe(node, call) }
}

interface Pair { readonly p: FakeLmdeploy, readonly d: FakeLmdeploy, readonly prefill: AdapterNode, readonly decode: AdapterNode, readonly call: Call }

async function pair (t: T, generation: Generation, more: FakeLmdeployOptions = {}): Promise<Pair> {
  const call = callWith(dispatcherFor(t))
  const p = await lmdeploy(t, { role: 2, generation, ...more })
  const d = await lmdeploy(t, { role: 3, gated: more.gated })
  const [prefill, decode] = await Promise.all([probed(nodeAt(p.url, { role: 'prefill' }), call), probed(nodeAt(d.url, { role: 'decode' }), call)])
  return { p, d, prefill, decode, call }
}

async function handOver ({ prefill, decode, call }: Pair, request: object, path = CHAT): Promise<{ handoff: Handoff, text: string }> {
  const body = await bodyFrom(request)
  const handoff = await pytorch.prefill({ node: prefill, decode, path, body, features: [] }, call)
  return { handoff, text: await textOf(await pytorch.generate({ node: decode, path, body, features: [], handoff }, call)) }
}

const hello = { model: 'm', messages: [{ role: 'user', content: [{ type: 'text', text: 'hello' }, PICTURE] }] }

t.test('lmdeploy: probes report what P and D can do for each other', async t => {
  const { prefill, decode, p, call } = await pair(t, '0.11')
  t.match(prefill.info, { role: 'prefill', produces: ['kv:lmdeploy/1'], accepts: [], vision: 'full', maxPrefillTokens: 8192, notes: [] })
  t.match(decode.info, { role: 'decode', produces: [], accepts: ['kv:lmdeploy/1'], standalone: true, notes: [] })
  t.match(await pytorch.probe(nodeAt(p.url, { role: 'prefill', maxPrefillTokens: 32_768 }), call), { maxPrefillTokens: 32_768 })
  t.match(await pytorch.probe(nodeAt(p.url), call), { produces: [], maxPrefillTokens: undefined })
})

t.test('lmdeploy: the handshake is RDMA\'s, both infos go through as they are, D connects first', async t => {
  const { p, d, prefill, decode, call } = await pair(t, '0.12')
  t.same(await pytorch.link(prefill, decode, call), { from: p.url, to: d.url, transport: 'rdma', epochs: [undefined, undefined] })
  const [init, connect] = p.distserve.handshakes
  t.match(init, {
    path: '/distserve/p2p_initialize',
    body: { local_engine_id: p.url, remote_engine_id: d.url, protocol: 2, rank: null, tcp_config: null, rdma_config: { with_gdr: true, link_type: 2 }, nvlink_config: {}, local_engine_config: { tp_size: 1, num_gpu_blocks: 1234 } }
  })
  t.match(connect!.body, { protocol: 2, remote_engine_id: d.url, remote_engine_endpoint_info: { zmq_address: `tcp://127.0.0.1:${d.port}` } })
  t.same(connect!.body.remote_kvtransfer_endpoint_info, [{ protocol: 2, endpoint_info: `{"gid":"${d.port}"}`, cache_pools: [] }])
  t.same(d.distserve.handshakes.map(({ path }) => path), ['/distserve/p2p_initialize', '/distserve/p2p_connect'])
  const order = [...p.seen, ...d.seen].filter(({ path }) => path === '/distserve/p2p_connect')
  t.equal(order.length, 2)
  t.same([...p.distserve.kept.keys()], [], 'asking for its way of naming sessions leaves nothing behind')
})

t.test('lmdeploy: what can\'t work is refused at the handshake, with the reason', async t => {
  const rows: Array<[FakeLmdeployOptions, FakeLmdeployOptions, RegExp]> = [
    [{ tpSize: 2 }, {}, /their tp_size differs \(2 and 1\)/],
    [{ blockSize: 32 }, {}, /their block_size differs \(32 and 64\)/],
    [{ generation: '0.15' }, {}, /0\.15 and later does not name the session/],
    [{ role: 1 }, {}, /from prefill to decode only/]
  ]
  const call = callWith(dispatcherFor(t))
  for (const [one, other, reason] of rows) {
    const [p, d] = [await lmdeploy(t, { role: 2, generation: '0.11', ...one }), await lmdeploy(t, { role: 3, ...other })]
    const prefill = await probed(nodeAt(p.url, { role: p.distserve.options.role === 2 ? 'prefill' : 'hybrid' }), call)
    t.match(await failure(pytorch.link(prefill, await probed(nodeAt(d.url, { role: 'decode' }), call), call)), { code: 'REFUSED', message: reason })
    t.equal(d.distserve.handshakes.some(({ path }) => path === '/distserve/p2p_connect'), false)
  }
  const { p, d, prefill, decode } = await pair(t, '0.11')
  d.distserve.refusesToConnect = true
  t.match(await failure(pytorch.link(prefill, decode, call)), { code: 'REFUSED', message: /status 2/ })
  for (const fake of [p, d]) t.ok(fake.distserve.handshakes.some(({ path }) => path === '/distserve/p2p_drop_connect'), 'half a link is undone')
})

const SESSIONS: Array<[Generation, string]> = [['0.11', 'id'], ['0.12', 'id'], ['0.13', 'id'], ['cache_session_id', 'member'], ['remote_session_id', 'member']]
for (const [generation, where] of SESSIONS) {
  t.test(`lmdeploy ${generation}: P keeps a chat's KV blocks, D takes them over, and the session named (${where}) is the right one`, async t => {
    const it = await pair(t, generation, { gated: true })
    await pytorch.link(it.prefill, it.decode, it.call)
    const evil = { with_cache: false, migration_request: { remote_engine_id: 'x' }, encoder_result: [] }
    const { handoff, text } = await handOver(it, { ...hello, stream: false, max_tokens: 40, min_new_tokens: 7, stream_options: { include_usage: true }, session_id: 5, ...evil })
    t.match(JSON.parse(text), { choices: [{ message: { content: 'I see 1 pictures.' } }] }, 'D made its prompt of the original body')
    const asked = it.p.prefills()[0]!
    t.match(asked, { headers: { 'x-lmdeploy-distserve-proxy': '1' }, body: { max_tokens: 1, max_completion_tokens: 1, min_new_tokens: 1, stream: false, with_cache: true, preserve_cache: true } })
    t.strictSame(['stream_options', 'migration_request', 'encoder_result'].filter(name => name in asked.body!), [])
    t.not(asked.body!.session_id, 5, 'a session of the client\'s would be occupied on P')
    const got = it.d.generations()[0]!
    t.match(got, { headers: { 'x-lmdeploy-distserve-proxy': '1' }, body: { max_tokens: 40, min_new_tokens: 7, session_id: 5 } })
    t.match(got.body!.migration_request, { protocol: 2, remote_engine_id: it.p.url, remote_token_id: 785, remote_block_ids: Array, is_dummy_prefill: false })
    t.strictSame(['with_cache', 'preserve_cache'].filter(name => name in got.body!), [])
    t.equal(it.p.distserve.kept.size, 0, 'D\'s ACK was for the session that P knows')

    const unused = await pytorch.prefill({ node: it.prefill, decode: it.decode, body: await bodyFrom(hello), features: [] }, it.call)
    t.equal(it.p.distserve.kept.size, 1)
    await pytorch.release([{ node: it.prefill, lease: unused.lease, wire: unused.wire }], it.call)
    t.equal(it.p.distserve.kept.size, 0, 'what D does not take is freed by the same name')
    t.not(handoff.lease, unused.lease)
  })
}

t.test('lmdeploy: a completion\'s session is named by 0.11 and 0.12, of others one node must serve it', async t => {
  const completion = { model: 'm', prompt: 'hello', max_tokens: 4 }
  for (const generation of ['0.11', '0.12', 'cache_session_id', 'remote_session_id'] as const) {
    const it = await pair(t, generation)
    await pytorch.link(it.prefill, it.decode, it.call)
    for (let i = 0; i < 2; i++) await handOver(it, completion, '/v1/completions')
    t.equal(it.p.distserve.kept.size, 0, generation)
    t.notOk('max_completion_tokens' in it.p.prefills()[0]!.body!)
  }
  const it = await pair(t, '0.13')
  await pytorch.link(it.prefill, it.decode, it.call)
  t.match(await failure(handOver(it, completion, '/v1/completions')), { code: 'KV_GONE', singleNode: true })
  t.equal(it.p.prefills().length, 0, 'P is not even asked')
  const broken = await pair(t, '0.15')
  t.match(await failure(handOver(broken, hello)), { code: 'REFUSED', message: /InternLM\/lmdeploy#4977/ })
  t.equal(broken.p.prefills().length, 0)
})

t.test('lmdeploy: a first token that ends the answer fails on P, which is neither blamed nor left with the blocks', async t => {
  const it = await pair(t, '0.12')
  await pytorch.link(it.prefill, it.decode, it.call)
  const ends = { model: 'm', messages: [{ role: 'user', content: ENDS_AT_ONCE }] }
  t.match(await failure(handOver(it, ends)), { code: 'KV_GONE', singleNode: true, message: /first token/ })
  t.equal(it.p.distserve.freed.length, 2, 'the session that was set for it is freed, and that of the first question')
  it.p.health = 'unhealthy'
  t.match(await failure(handOver(it, ends)), { code: 'UNAVAILABLE' }, 'unless P says it is ill')
  it.p.health = 'healthy'
  it.p.faults.push({ kind: 'status', status: 500 })
  t.match(await failure(handOver(it, hello)), { code: 'UNAVAILABLE' }, 'or words its error')
  it.p.faults.push({ kind: 'status', status: 200, body: { id: '7', choices: [] } })
  t.match(await failure(handOver(it, hello)), { code: 'UNAVAILABLE', message: /without cache_block_ids/ })
  it.p.faults.push({ kind: 'status', status: 200, body: { id: '7', cache_block_ids: [1], remote_token_ids: [] } })
  t.match(await failure(handOver(it, hello)), { code: 'KV_GONE', singleNode: true })
  t.equal(it.p.distserve.freed.at(-1), 7)
})

async function ours (t: T, role: EngineRole, call: Call): Promise<{ engine: ScriptedEngine, node: AdapterNode }> {
  const { engine, url } = await startScripted(t, role)
  return { engine, node: await probed(nodeAt(url, { role }), call) }
}

const migration = { protocol: 1, remote_engine_id: 'p', epoch: 4711, lease: 'kv1', remote_session_id: 17, remote_block_ids: [3, 4], remote_token_id: 785, token_ids: [1, 2, 3], cached_tokens: 2, anything: { else: true } }

t.test('our engines: P gets the features and one token to make, D what P has written, as it is', async t => {
  const call = callWith(dispatcherFor(t))
  const [p, d] = [await ours(t, 'prefill', call), await ours(t, 'decode', call)]
  p.engine.answer = async () => ({ status: 200, json: { object: 'chat.completion', migration_request: migration } })
  const body = await bodyFrom({ ...hello, model: 'fake-vlm', max_tokens: 40, stream: true, stream_options: {}, min_tokens: 3 })
  const features = [{ item: 0, node: 'e', lease: 'f1', tokens: 80, cached: false, wire: { lease: 'f1' } }]
  const handoff = await pytorch.prefill({ node: p.node, decode: d.node, path: CHAT, body, features }, call)
  t.match(handoff, { node: p.node.id, lease: 'kv1', tokens: 3, cached: 2 })
  const asked = p.engine.calls[0]!
  t.match(asked.body, { max_tokens: 1, max_completion_tokens: 1, min_tokens: 1, stream: false, with_cache: true, preserve_cache: true, encoder_result: [{ lease: 'f1' }], messages: [{ content: [{}, { image_url: { url: 'epd:f1' } }] }] })
  t.notOk('stream_options' in (asked.body as object))

  t.equal((await pytorch.generate({ node: d.node, path: CHAT, body, features: [], handoff }, call)).statusCode, 200)
  const got = d.engine.calls[0]!.body as Record<string, unknown>
  t.same(got.migration_request, migration)
  t.match(got, { max_tokens: 40, stream: true, messages: [{ content: [{ text: 'hello' }, { image_url: { url: 'epd:kv1' } }] }] })
  t.strictSame(['encoder_result', 'with_cache', 'preserve_cache'].filter(name => name in got), [])

  await pytorch.release([{ node: p.node, lease: handoff.lease, wire: handoff.wire }], call)
  t.same(p.engine.ended, ['kv1'])
  await pytorch.abort(p.node, 'r1.p', call)
  t.same(p.engine.aborted, ['r1.p'])
})

t.test('our engines: each error of P and of D means what it means', async t => {
  const call = callWith(dispatcherFor(t))
  const [p, d] = [await ours(t, 'prefill', call), await ours(t, 'decode', call)]
  const body = await bodyFrom({ model: 'fake-vlm', messages: [{ role: 'user', content: 'hi' }] })
  const prefill = async (): Promise<unknown> => await failure(pytorch.prefill({ node: p.node, decode: d.node, body, features: [] }, call))
  const rows = [['features_gone', 'FEATURES_GONE'], ['not_linked', 'FEATURES_GONE'], ['busy', 'BUSY'], ['internal', 'UNAVAILABLE'], ['invalid_request', 'REJECTED']] as const
  for (const [code, expected] of rows) {
    p.engine.answer = async () => { throw new EngineError(code, 'why') }
    t.match(await prefill(), { code: expected }, code)
  }
  p.engine.answer = async () => { throw new EngineError('invalid_request', 'not here', { param: 'preserve_cache' }) }
  t.match(await prefill(), { code: 'REFUSED', message: /no prefill engine/ })
  p.engine.answer = async () => ({ status: 200, json: { object: 'chat.completion' } })
  t.match(await prefill(), { code: 'UNAVAILABLE', message: /without a migration request/ })
  const seeing = await bodyFrom(hello)
  t.match(await failure(pytorch.prefill({ node: { ...p.node, info: { ...p.node.info!, vision: 'features' } }, decode: d.node, body: seeing, features: [] }, call)), { singleNode: true }, 'no pixels to a P without vision weights')

  const handoff = { node: p.node.id, lease: 'kv1', wire: migration }
  const generate = async (): Promise<unknown> => await failure(pytorch.generate({ node: d.node, path: CHAT, body, features: [], handoff }, call))
  for (const [status, code, param, expected] of [
    [410, 'kv_gone', null, { code: 'KV_GONE', unlinked: true }],
    [502, 'kv_corrupt', null, { code: 'KV_GONE', unlinked: false }],
    [409, 'not_linked', null, { code: 'KV_GONE', unlinked: true }],
    [409, 'wrong_model', null, { code: 'KV_GONE', unlinked: true }],
    [400, 'invalid_request', 'migration_request.remote_block_ids', { code: 'KV_GONE' }],
    [400, 'invalid_request', 'top_p', { code: 'REJECTED' }],
    [500, 'internal', null, { code: 'UNAVAILABLE' }]
  ] as const) {
    d.engine.answer = async () => ({ status, json: { error: { message: 'why', type: 'x', code, param } } })
    t.match(await generate(), expected, code)
  }
  t.match(await failure(pytorch.generate({ node: p.node, path: CHAT, body, features: [], handoff }, call)), { code: 'REFUSED', message: /takes no migration request/ })
  t.match(await failure(pytorch.prefill({ node: d.node, decode: d.node, body, features: [] }, call)), { code: 'REFUSED', message: /hands no KV blocks on/ })
})

t.test('our engines: links of KV blocks compare their shape, and other families are refused', async t => {
  const call = callWith(dispatcherFor(t))
  const [p, d] = [await ours(t, 'prefill', call), await ours(t, 'decode', call)]
  const kv = { block_tokens: 16, layers: 4, kv_heads: 2, head_dim: 32, dtype: 'float32', block_bytes: 1024, num_blocks: 9 }
  Object.assign(p.engine.more, { kv })
  Object.assign(d.engine.more, { kv: { ...kv, num_blocks: 3 } })
  t.match(await pytorch.link(p.node, d.node, call), { from: p.node.id, to: d.node.id, epochs: [4711, 4711] })
  for (const [key, value] of [['layers', 5], ['kv_heads', 1], ['head_dim', 64], ['dtype', 'float16'], ['block_tokens', 32]] as const) {
    Object.assign(d.engine.more, { kv: { ...kv, [key]: value } })
    t.match(await failure(pytorch.link(p.node, d.node, call)), { code: 'REFUSED', message: new RegExp(`kv blocks differ in ${key}`) })
  }
  const real = await lmdeploy(t, { role: 3 })
  t.match(await failure(pytorch.link(p.node, nodeAt(real.url, { role: 'decode' }), call)), { code: 'REFUSED', message: /blocks in a way of its own/ })
})

interface House extends FakeGateway { readonly p: FakeLmdeploy, readonly ds: FakeLmdeploy[], readonly hybrids: FakeLmdeploy[], ask (text: string, more?: object): Promise<Response> }

async function house (t: Test, generation: Generation, { hybrids = 0, decodes = 1, options = {} }: { hybrids?: number, decodes?: number, options?: EpdOptions } = {}): Promise<House> {
  const p = await lmdeploy(t, { role: 2, generation, gated: true })
  const ds = await Promise.all(Array.from({ length: decodes }, () => lmdeploy(t, { role: 3, gated: true })))
  const hs = await Promise.all(Array.from({ length: hybrids }, () => lmdeploy(t)))
  const nodes = [[p, 'prefill'] as const, ...ds.map(d => [d, 'decode'] as const), ...hs.map(h => [h, 'hybrid'] as const)].map(([fake, role]) => ({ url: fake.url, role }))
  const gateway = await buildGateway(t, { options: { nodes, ...options } })
  await gateway.app.epd.nodes.waitFor(({ nodes }) => nodes.every(({ state, links }) => state === 'healthy' && [...links.values()].every(link => link.state !== 'linking' && link.state !== 'none')), { signal: AbortSignal.timeout(10_000) })
  return { ...gateway, p, ds, hybrids: hs, ask: (text, more = {}) => post(gateway.url + CHAT, { model: 'm', messages: [{ role: 'user', content: text }], ...more }) }
}

t.test('lmdeploy behind a gateway: streams, several decode nodes, and a D that dies before its first byte', async t => {
  const h = await house(t, '0.13', { decodes: 2 })
  const answer = await h.ask('hello', { stream: true })
  t.equal(answer.headers.get('x-epd-plan'), 'p-d')
  t.match(await answer.text(), /"content":"I".*data: \[DONE\]/s)
  h.ds[1]!.faults.push({ kind: 'silence' })
  const asked = h.ask('hello')
  await until(() => h.ds[1]!.generations().length === 1, 'the other D has its turn')
  await h.ds[1]!.vanish()
  const other = await asked
  t.equal(other.status, 502, 'a request under which a node has died goes to no second one')
  t.equal(h.ds[0]!.generations().length, 1)
  await until(() => h.p.distserve.kept.size === 0, 'nothing is kept')
  t.equal(h.p.distserve.freed.length, 2, 'freed: the first question\'s, and once what the dead D did not take')
})

t.test('lmdeploy behind a gateway: a restarted P is linked anew before it is used', async t => {
  const h = await house(t, '0.11')
  t.equal((await h.ask('hello')).status, 200)
  await h.p.vanish()
  h.app.epd.nodes.probe(h.p.url)
  await h.app.epd.nodes.waitFor(snapshot => snapshot.byId.get(h.p.url)!.state === 'unhealthy', { signal: AbortSignal.timeout(10_000) })
  await h.p.comeBack()
  h.app.epd.nodes.probe(h.p.url)
  const before = h.ds[0]!.distserve.handshakes.length
  await h.app.epd.nodes.waitFor(snapshot => snapshot.byId.get(h.p.url)!.state === 'healthy' && snapshot.link(h.p.url, h.ds[0]!.url) === 'linked', { signal: AbortSignal.timeout(10_000) })
  t.ok(h.ds[0]!.distserve.handshakes.length > before)
  const answer = await h.ask('hello')
  t.equal(answer.status, 200)
  t.equal(answer.headers.get('x-epd-plan'), 'p-d')
})

t.test('lmdeploy behind a gateway: what P can\'t do is done by one node, and the client gets the right answer', async t => {
  const alone = await house(t, '0.13', { options: { retries: 0 } })
  const empty = await alone.ask(ENDS_AT_ONCE)
  t.match(await empty.json(), { choices: [{ message: { content: '' }, finish_reason: 'stop' }] })
  t.equal(empty.headers.get('x-epd-plan'), 'pd')
  t.match(empty.headers.get('x-epd-reason'), /not to be shared/)
  const long = 'x'.repeat(40_000)
  const answer = await alone.ask(long)
  t.equal(answer.status, 200)
  t.equal(answer.headers.get('x-epd-reason'), 'text only, prompt too long for the prefill nodes')
  t.match(await (await alone.ask('hello', { n: 2 })).json(), { error: { param: 'n', code: 'unsupported_value' } })
  t.equal(alone.app.epd.nodes.get(alone.p.url)!.breakers.prefill, 'closed')
  t.equal((await post(`${alone.url}/v1/completions`, { model: 'm', prompt: 'x' })).headers.get('x-epd-plan'), 'pd')

  const h = await house(t, '0.15', { hybrids: 1 })
  const plain = await h.ask('x'.repeat(8_000))
  t.equal(plain.headers.get('x-epd-reason'), 'text only, no decode node fits a prefill node')
  t.equal(h.hybrids[0]!.generations().length, 1)
  t.match(h.app.epd.nodes.status()[h.p.url], { notes: [/not used by plans: .*0\.15 and later does not name the session/], links: { [h.ds[0]!.url]: { state: 'refused' } } })
})
