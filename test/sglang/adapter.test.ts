/** The adapter `sglang` before language servers that call their encoders past the gateway. */
import t, { type Test } from 'tap'
import { detectAdapter, sglang } from '../../adapters/index.ts'
import { bodyFrom, callWith, dispatcherFor, nodeAt, textOf } from '../helper/adapter-call.ts'
import { buildGateway, chat, pictureUrl, post } from '../helper/fake-gateway.ts'
import { FakeSglangEncoder, FakeSglangLm, type FakeLmOptions } from '../helper/fake-sglang.ts'
import { until } from '../helper/until.ts'

const BAD = 'data:image/png;base64,AAAA'

async function fixture (t: Test, options: FakeLmOptions = {}) {
  const encoders = [await FakeSglangEncoder.start(t), await FakeSglangEncoder.start(t)]
  const lm = await FakeSglangLm.start(t, { encoderUrls: encoders.map(encoder => encoder.url), ...options })
  const { url, app } = await buildGateway(t, { options: { nodes: [lm.spec] } })
  await until(() => app.epd.gateway.serves('tiny'), 'the language server is known')
  return { encoders, lm, url, app, ask: async (body: object, init: RequestInit = {}) => await post(`${url}/v1/chat/completions`, { ...body, model: 'tiny' }, init) }
}

t.test('a probe reads what the server was started with', async t => {
  const call = callWith(dispatcherFor(t))
  const encoder = await FakeSglangEncoder.start(t)
  t.match(await sglang.probe(nodeAt(encoder.url, { role: 'encoder' }), call), { status: 'healthy', models: [], role: 'encoder', backend: 'sglang encoder', vision: 'full' })
  const lm = await FakeSglangLm.start(t, { encoderUrls: [encoder.url] })
  t.equal(await detectAdapter(nodeAt(lm.url), call), 'sglang')
  const info = await sglang.probe(nodeAt(lm.url), call)
  t.match(info, { status: 'healthy', models: ['tiny'], role: 'hybrid', backend: 'sglang', version: '0.5.23', vision: 'full', notes: [/past the gateway/, /zmq_to_scheduler/], details: { languageOnly: true, virtual: false, transfer: 'zmq_to_scheduler' } })
  await sglang.probe(nodeAt(lm.url, { info }), call)
  t.equal(lm.calls('/server_info').length, 1, 'once per process')
  const plain = await FakeSglangLm.start(t, { languageOnly: false })
  t.match(await sglang.probe(nodeAt(plain.url, { vision: 'none' }), call), { vision: 'none', notes: [], details: { languageOnly: false } })
  t.match(await sglang.probe(nodeAt(plain.url, { role: 'decode' }), call), { notes: [/not used by plans without --disaggregation-mode/] })
  await plain.kill()
  await t.rejects(sglang.probe(nodeAt(plain.url), call), { code: 'UNAVAILABLE' })
})

t.test('a request goes on under the id of the gateway, and a client can neither choose it nor name a prefill', async t => {
  const lm = await FakeSglangLm.start(t)
  const call = callWith(dispatcherFor(t), { headers: { 'x-request-id': 'r1.a' } })
  const node = nodeAt(lm.url)
  const body = await bodyFrom({ model: 'tiny', messages: [{ role: 'user', content: 'hi' }], rid: 'mine', bootstrap_host: '10.0.0.1', bootstrap_port: 1, bootstrap_room: 2 })
  t.match(JSON.parse(await textOf(await sglang.generate({ node, path: '/v1/chat/completions', body, features: [] }, call))), { id: 'r1.a' })
  t.strictSame(lm.generations[0]!.body, { model: 'tiny', messages: [{ role: 'user', content: 'hi' }], rid: 'r1.a' })
  t.match(await sglang.generate({ node, path: '/v1/embeddings', body, features: [] }, call).catch((error: unknown) => error), { code: 'REJECTED' })
  t.strictSame(lm.calls('/v1/embeddings')[0]!.body, { model: 'tiny', messages: [{ role: 'user', content: 'hi' }], rid: 'mine' })
  await t.rejects(sglang.link(node, node, call), { code: 'REFUSED' })
  await t.rejects(sglang.encode({ node, items: [], body, consumer: node }, call), { code: 'REFUSED' })
  await t.rejects(sglang.prefill({ node, decode: node, body, features: [] }, call), { code: 'REFUSED' })
})

t.test('a server without vision gets no media', async t => {
  const lm = await FakeSglangLm.start(t)
  const body = await bodyFrom(chat('?', pictureUrl('a')))
  await t.rejects(sglang.generate({ node: nodeAt(lm.url, { vision: 'none' }), path: '/v1/chat/completions', body, features: [] }, callWith(dispatcherFor(t))), { code: 'REFUSED' })
  t.same(lm.generations, [])
})

for (const stream of [false, true]) {
  t.test(`pictures go to encoders that the server calls by itself${stream ? ', and the answer streams' : ''}`, async t => {
    const f = await fixture(t)
    const answer = await f.ask({ ...chat('?', pictureUrl('a'), pictureUrl('b'), pictureUrl('c')), stream })
    t.equal(answer.status, 200)
    t.match(await answer.text(), /saw \w{8} \w{8} \w{8}/)
    t.equal(f.encoders.flatMap(encoder => encoder.calls('/encode')).length, 2)
  })

  t.test(`a client that leaves while embeddings are outstanding costs no server${stream ? ', of a stream too' : ''}`, async t => {
    const f = await fixture(t)
    let release!: () => void
    const hold = new Promise<void>(resolve => { release = resolve })
    for (const encoder of f.encoders) encoder.faults.push({ hold })
    const leaving = new AbortController()
    const left = f.ask({ ...chat('?', pictureUrl('a')), stream }, { signal: leaving.signal }).catch((error: Error) => error.name)
    await until(() => f.lm.waiting === 1, 'the server waits for the embeddings')
    leaving.abort()
    t.equal(await left, 'AbortError')
    await until(() => f.app.epd.gateway.inFlight === 0, 'the gateway is done with the request')
    release()
    await until(() => f.lm.answered.length === 1, 'the server has answered, unread')
    t.equal(f.lm.died, undefined)
    t.equal((await f.ask(chat('?', pictureUrl('b')))).status, 200)
  })
}

t.test('a client of a server that bears it, and one that sends text, are cut off at once', async t => {
  for (const [options, ...pictures] of [[{ transfer: 'zmq_to_tokenizer' }, pictureUrl('a')], [{}]] as Array<[FakeLmOptions, ...string[]]>) {
    const f = await fixture(t, options)
    let release!: () => void
    f.lm.hold = new Promise<void>(resolve => { release = resolve })
    const leaving = new AbortController()
    const left = f.ask(chat('?', ...pictures), { signal: leaving.signal }).catch((error: Error) => error.name)
    await until(() => f.lm.generations.length === 1, 'the server has the request')
    const closed = f.lm.nextClose()
    leaving.abort()
    t.equal(await left, 'AbortError')
    await closed
    release()
    t.equal(f.lm.died, undefined)
  }
})

t.test('what a failed picture does, without the gateway in front of the encoders', async t => {
  const bearing = await fixture(t, { transfer: 'zmq_to_tokenizer' })
  t.equal((await bearing.ask(chat('?', BAD))).status, 503)
  t.equal((await bearing.ask(chat('?', pictureUrl('a')))).status, 200)
  const dying = await fixture(t)
  t.equal((await dying.ask(chat('?', BAD))).status, 502, 'it is given to no second server')
  t.match(dying.lm.died, /Error while loading data/, 'the recorded text')
})
