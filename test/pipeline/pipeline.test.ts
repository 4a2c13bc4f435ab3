import { request as httpRequest } from 'node:http'
import t, { type Test } from 'tap'
import type { Adapter } from '../../adapters/adapter.ts'
import { abortable, TimeLimit } from '../../adapters/abort.ts'
import { fingerprint } from '../../plugin/body/index.ts'
import { rank } from '../../plugin/planning/index.ts'
import { fakeAdapter, FakeNode, type FakeNodeOptions } from '../helper/fake-node.ts'
import { buildGateway, chat, pictureUrl, post, settled, type FakeGateway } from '../helper/fake-gateway.ts'
import { until } from '../helper/until.ts'
import type { EpdOptions } from '../../plugin/index.ts'

interface Fixture extends FakeGateway { readonly encoders: FakeNode[], readonly pds: FakeNode[], ask (...urls: string[]): Promise<Response> }

async function fixture (t: Test, { encoders = 1, pds = 1, pd = {}, options = {} }: { encoders?: number, pds?: number, pd?: FakeNodeOptions, options?: EpdOptions } = {}): Promise<Fixture> {
  const es = await Promise.all(Array.from({ length: encoders }, () => FakeNode.start(t, { role: 'encoder' })))
  const ps = await Promise.all(Array.from({ length: pds }, () => FakeNode.start(t, pd)))
  const gateway = await buildGateway(t, { nodes: [...es, ...ps], options: { bypass: 'never', ...options } })
  return { ...gateway, encoders: es, pds: ps, ask: (...urls) => post(`${gateway.url}/v1/chat/completions`, chat('?', ...urls)) }
}

t.test('a picture goes E -> PD: leases in order, and no release of what the consumer ACKs', async t => {
  const f = await fixture(t, { encoders: 3 })
  const answer = await f.ask(...['a', 'b', 'c', 'd'].map(seed => pictureUrl(seed)))
  t.equal(answer.status, 200)
  t.equal(answer.headers.get('x-epd-plan'), 'e-pd')
  const names = answer.headers.get('x-epd-encoders')!.split(',')
  t.equal(names.length, 4)
  const leases = f.pds[0]!.generations[0]!.body.features as string[]
  t.same(leases.map(lease => `http://127.0.0.1:${lease.split('-')[0]}`), names, 'each lease is of the encoder that the header names for the item')
  t.ok(f.encoders.every(encoder => encoder.calls('/encode').length <= 1), 'one call for all items of an encoder')
  t.same(f.encoders.flatMap(encoder => encoder.released), [])
  const again = await f.ask(...['a', 'b', 'c', 'd'].map(seed => pictureUrl(seed)))
  t.equal(again.headers.get('x-epd-encoders'), names.join(','), 'the same pictures meet the same encoders')
})

for (const fault of ['reset', 'failed', 'busy'] as const) {
  t.test(`an encoder that is ${fault} hands its items to the next one by hash`, async t => {
    const f = await fixture(t, { encoders: 2 })
    const usual = (await f.ask(pictureUrl('a'))).headers.get('x-epd-encoders')
    const first = f.encoders.find(encoder => encoder.url === usual)!
    // A kept connection that is reset is tried once more on a fresh one.
    first.encodeFaults.push(...fault === 'reset' ? [fault, fault] as const : [fault])
    const answer = await f.ask(pictureUrl('a'))
    t.equal(answer.status, 200)
    t.equal(answer.headers.get('x-epd-encoders'), f.encoders.find(encoder => encoder !== first)!.url)
    t.equal(f.app.epd.gateway.stats.encodeMoves, 1)
    t.equal(f.app.epd.gateway.stats.retries, 0, 'within the same plan')
  })
}

t.test('an encoder that hangs counts as dead after its timeout', async t => {
  const f = await fixture(t, { encoders: 2, options: { timeouts: { encode: 100 } } })
  for (const encoder of f.encoders) encoder.encodeFaults.push('silence')
  const answer = await f.ask(pictureUrl('a'))
  t.equal(answer.status, 503)
  t.match(await answer.json(), { error: { code: 'encode_failed', type: 'server_error' } })
  t.ok(answer.headers.get('retry-after'))
  await until(() => f.encoders.every(encoder => encoder.calls('/encode')[0]!.aborted), 'both calls were broken off')
  await until(() => f.encoders.every(encoder => encoder.abortedRequests.length === 1), 'both got an abort: they may have answered all the same')
})

t.test('encoders that have come since a request was planned take its items when all of its own have failed', async t => {
  const f = await fixture(t, { options: { timeouts: { encode: 1_500 } } })
  const [first] = f.encoders as [FakeNode]
  first.encodeFaults.push('silence')
  const asked = f.ask(pictureUrl('a'))
  await until(() => first.calls('/encode').length === 1, 'its encode call is on')
  const late = await FakeNode.start(t, { role: 'encoder' })
  const { registry } = f.app.epd.gateway
  registry.add(late.spec)
  await registry.waitFor(({ byId, link }) => byId.get(late.url)?.state === 'healthy' && link(late.url, f.pds[0]!.url) === 'linked')
  const answer = await asked
  t.equal(answer.status, 200)
  t.equal(answer.headers.get('x-epd-encoders'), late.url)
  t.equal(first.calls('/encode').length, 1, 'the one that is still lost is not asked again')
})

t.test('an encoder that answers nonsense is to blame, whatever its adapter makes of it', async t => {
  const results = [null, [null], [{ lease: 'x' }], [{ lease: 'x', tokens: NaN, item: 0 }], 'x']
  let next = 0
  const adapter = { ...fakeAdapter, name: 'broken', encode: async () => results[next++ % results.length] as never }
  const [encoder, pd] = await Promise.all([FakeNode.start(t, { role: 'encoder' }), FakeNode.start(t)])
  const f = await buildGateway(t, { nodes: [encoder, pd], options: { bypass: 'never', adapters: [fakeAdapter, adapter], nodes: [{ ...encoder.spec, adapter: 'broken' }, pd.spec] } })
  for (const result of results) {
    const answer = await post(`${f.url}/v1/chat/completions`, chat('?', pictureUrl('a')))
    t.equal(answer.status, 503, JSON.stringify(result))
    t.match(await answer.json(), { error: { code: 'encode_failed' } })
  }
})

t.test('without an encoder left the language model encodes by itself, and leases of the others are released', async t => {
  const f = await fixture(t, { encoders: 1, pd: { vision: 'full' } })
  f.encoders[0]!.encodeFaults.push('failed')
  const answer = await f.ask(pictureUrl('a'))
  t.equal(answer.status, 200)
  t.equal(answer.headers.get('x-epd-plan'), 'hybrid')
  t.equal(answer.headers.get('x-epd-reason'), 'encoders failed')
  t.equal(answer.headers.get('x-epd-encoders'), null)
  t.equal(f.pds[0]!.generations[0]!.body.features, undefined)
})

t.test('all encoders are full: 503 with their Retry-After, and what some had encoded is released', async t => {
  const f = await fixture(t, { encoders: 2 })
  const [one, other] = f.encoders as [FakeNode, FakeNode]
  one.encodeFaults.push('busy')
  other.encodeFaults.push('busy')
  other.encodeFaults.push('busy')
  one.encodeFaults.push('busy')
  const answer = await f.ask(pictureUrl('a'), pictureUrl('b'), pictureUrl('c'))
  t.equal(answer.status, 503)
  t.equal(answer.headers.get('retry-after'), '7')
  t.match(await answer.json(), { error: { code: 'upstream_busy' } })
  await until(() => one.leases.size + other.leases.size === 0, 'all leases are released')
})

t.test("a bad picture is the client's: the encoder's 4xx comes through, nothing is retried, the other calls are broken off", async t => {
  const f = await fixture(t, { encoders: 3 })
  const urls = ['a', 'b', 'c', 'd', 'e', 'f'].map(seed => pictureUrl(seed))
  const usual = (await f.ask(...urls)).headers.get('x-epd-encoders')!.split(',')
  const bad = f.encoders.find(encoder => encoder.url === usual[0])!
  const others = f.encoders.filter(encoder => encoder !== bad && usual.includes(encoder.url))
  bad.encodeFaults.push('rejected')
  let release!: () => void
  const hold = new Promise<void>(resolve => { release = resolve })
  for (const encoder of others) encoder.encodeFaults.push({ hold })
  const answer = await f.ask(...urls)
  t.equal(answer.status, 400)
  t.match(await answer.json(), { error: { code: 'invalid_media', param: 'messages[0].content[0]' } })
  t.equal(f.pds[0]!.generations.length, 1, 'none beyond the first')
  t.equal(f.app.epd.gateway.stats.encodeMoves, 0)
  await until(() => others.every(encoder => encoder.calls('/encode')[1]?.aborted !== false), 'the other calls were broken off')
  release()
})

t.test('features that are gone start the request again at the plan, as often as retries says, with fresh leases', async t => {
  const f = await fixture(t, { encoders: 1 })
  f.pds[0]!.generateFaults.push('gone')
  const answer = await f.ask(pictureUrl('a'))
  t.equal(answer.status, 200)
  const [first, second] = f.pds[0]!.generations.map(call => (call.body.features as string[])[0]!)
  t.not(first, second)
  await until(() => f.encoders[0]!.released.includes(first!), 'the first lease is released')
  t.notOk(f.encoders[0]!.released.includes(second!))

  f.pds[0]!.generateFaults.push('gone', 'gone', 'gone')
  const failed = await f.ask(pictureUrl('a'))
  t.equal(failed.status, 503)
  t.match(await failed.json(), { error: { code: 'features_gone' } })
  t.equal(f.pds[0]!.generations.length, 5, 'three attempts, no more')
})

for (const fault of ['reset', 'failed', 'busy'] as const) {
  t.test(`a language model that is ${fault} before its first event: another one answers, leases are released`, async t => {
    const f = await fixture(t, { pds: 2 })
    f.pds[0]!.generateFaults.push(...fault === 'reset' ? [fault, fault] as const : [fault])
    const answer = await f.ask(pictureUrl('a'))
    t.equal(answer.status, 200)
    t.equal(f.pds[1]!.generations.length, 1)
    await until(() => f.encoders[0]!.released.length === 1, 'the lease of the first attempt is released')
    t.equal(f.app.epd.gateway.stats.retries, 1)
  })
}

t.test('retries: 0 means one attempt', async t => {
  const f = await fixture(t, { pds: 2, options: { retries: 0 } })
  f.pds[0]!.generateFaults.push('failed')
  const answer = await f.ask()
  t.equal(answer.status, 500)
  t.match(await answer.json(), { error: { code: 'internal', message: 'scripted failed' } })
  t.equal(f.pds[1]!.generations.length, 0)
})

t.test('after two nodes that have not answered in time a third one is not asked', async t => {
  const f = await fixture(t, { pds: 3, options: { timeouts: { answer: 100 } } })
  for (const pd of f.pds.slice(0, 2)) pd.generateFaults.push('silence')
  const answer = await f.ask()
  t.equal(answer.status, 504)
  t.match(await answer.json(), { error: { code: 'upstream_timeout' } })
  t.equal(f.pds[2]!.generations.length, 0)
})

t.test('a language model that hangs counts as dead after its timeout and gets an abort', async t => {
  const f = await fixture(t, { pds: 2, options: { timeouts: { answer: 1_000 } } })
  f.pds[0]!.generateFaults.push('silence')
  t.equal((await f.ask()).status, 200)
  t.equal(f.pds[1]!.generations.length, 1)
  await until(() => f.pds[0]!.abortedRequests.length === 1, 'the hanging node got an abort')
  t.ok(f.pds[0]!.generations[0]!.aborted)
  const [first, second] = f.pds.map(pd => pd.generations[0]!.headers['x-request-id'])
  t.equal(f.pds[0]!.abortedRequests[0], first)
  t.equal(second, `${first}-2`, 'the second attempt has an id of its own')
})

t.test('the deadline ends a request whatever attempts are left', async t => {
  const f = await fixture(t, { pds: 2, options: { timeouts: { total: 150 } } })
  for (const pd of f.pds) pd.generateFaults.push('silence')
  const answer = await f.ask()
  t.equal(answer.status, 504)
  t.match(await answer.json(), { error: { code: 'deadline_exceeded' } })
  t.equal(f.pds.flatMap(pd => pd.generations).length, 1)
})

t.test('a 4xx of the language model comes through as it is and is not retried', async t => {
  const f = await fixture(t, { pds: 2 })
  f.pds[0]!.generateFaults.push('rejected')
  const answer = await f.ask()
  t.equal(answer.status, 400)
  t.same(await answer.json(), { error: { message: 'scripted rejected', type: 'x', code: 'invalid_media', param: 'messages[0].content[0]' } })
  t.equal(answer.headers.get('x-epd-plan'), 'pd')
  t.equal(f.pds[1]!.generations.length, 0)
})

t.test('a stream that breaks off ends with an error event and is not retried', async t => {
  const f = await fixture(t, { pds: 2 })
  f.pds[0]!.generateFaults.push('half')
  const answer = await post(`${f.url}/v1/chat/completions`, { ...chat('?'), stream: true })
  t.equal(answer.status, 200)
  const text = await answer.text()
  t.match(text, /hello/)
  t.match(text, /"code":"upstream_broken"/)
  t.equal(f.pds[1]!.generations.length, 0)
})

t.test('a stream that falls silent is ended', async t => {
  const f = await fixture(t, { options: { timeouts: { idle: 100 } } })
  f.pds[0]!.generateFaults.push('pause')
  const answer = await post(`${f.url}/v1/chat/completions`, { ...chat('?'), stream: true })
  t.match(await answer.text(), /"code":"upstream_broken"/)
  await until(() => f.pds[0]!.generations[0]!.aborted, 'the call was broken off')
})

t.test('a client that leaves frees everything at once, wherever its request is', async t => {
  const f = await fixture(t, { encoders: 2, options: { admission: { visionTokens: 1 } } })
  const leave = async (body: object, ready: () => unknown): Promise<void> => {
    const { hostname, port } = new URL(f.url)
    const request = httpRequest({ hostname, port, path: '/v1/chat/completions', method: 'POST', headers: { 'content-type': 'application/json' } })
    request.on('error', () => {})
    request.end(JSON.stringify(body))
    await until(ready, 'the request is where it should be')
    request.destroy()
    await until(() => f.app.epd.gateway.inFlight === waiting, 'the request has ended')
  }
  let waiting = 0

  // In encode.
  for (const encoder of f.encoders) encoder.encodeFaults.push('silence')
  const encodes = () => f.encoders.flatMap(encoder => encoder.calls('/encode'))
  await leave(chat('?', pictureUrl('a')), () => encodes().length === 1)
  await until(() => encodes()[0]!.aborted, 'the encode call was broken off')
  for (const encoder of f.encoders) encoder.encodeFaults.length = 0

  // Before the first event: the lease goes too.
  f.pds[0]!.generateFaults.push('silence')
  await leave(chat('?', pictureUrl('b')), () => f.pds[0]!.generations.length === 1)
  await until(() => f.encoders.every(encoder => encoder.leases.size === 0), 'the lease is released')
  await until(() => f.pds[0]!.generations[0]!.aborted && f.pds[0]!.abortedRequests.length === 1, 'the node got an abort')

  // In the middle of a stream.
  f.pds[0]!.generateFaults.push('pause')
  await leave({ ...chat('?'), stream: true }, () => f.pds[0]!.generations.length === 2)
  await until(() => f.pds[0]!.generations[1]!.aborted, 'the stream was broken off')

  // Waiting for admission.
  let release!: () => void
  const hold = new Promise<void>(resolve => { release = resolve })
  for (const encoder of f.encoders) encoder.encodeFaults.push({ hold })
  const holder = f.ask(pictureUrl('c'))
  await until(() => encodes().length === 3, 'one request is in encode')
  waiting = 1
  await leave(chat('?', pictureUrl('d')), () => f.app.epd.gateway.admission.stats.waiting === 1)
  t.equal(f.app.epd.gateway.admission.stats.waiting, 0)
  release()
  t.equal((await holder).status, 200)
  const { gateway } = f.app.epd
  await until(() => gateway.inFlight === 0 && gateway.admission.stats.inFlight === 0, 'the gateway is at rest')
  await until(() => gateway.registry.snapshot().nodes.every(node => node.load.requests === 0 && node.load.tokens === 0), 'no node has load')
  t.ok(gateway.stats.requests().some(({ outcome }) => outcome === 'aborted'))
})

t.test('a hanging third-party adapter that ignores its signal does not hold the request, and its late lease is released', async t => {
  let finish!: (value: never) => void
  const released: string[] = []
  const adapter = {
    ...fakeAdapter,
    name: 'stubborn',
    encode: () => new Promise<never>(resolve => { finish = resolve }),
    async release (leases: ReadonlyArray<{ lease: string }>) { released.push(...leases.map(one => one.lease)) }
  }
  const encoder = await FakeNode.start(t, { role: 'encoder' })
  const pd = await FakeNode.start(t)
  const { url, app } = await buildGateway(t, { options: { adapters: [adapter, fakeAdapter], nodes: [{ ...encoder.spec, adapter: 'stubborn' }, pd.spec], bypass: 'never', timeouts: { encode: 500 } } })
  await settled(app.epd.nodes, [encoder, pd])
  const answer = await post(`${url}/v1/chat/completions`, chat('?', pictureUrl('a')))
  t.equal(answer.status, 503)
  finish([{ item: 0, node: encoder.url, lease: 'late', tokens: 1, cached: false, wire: {} }] as never)
  await until(() => released.length === 1, 'the late lease is released')
})

t.test('a node is told of a request that is being encoded, unless it has others, and what becomes of that is not looked at', async t => {
  const told: Array<{ id: string, node: string }> = []
  const overlaps: Array<string | undefined> = []
  const adapter: Adapter = {
    ...fakeAdapter,
    name: 'telling',
    async encode (job, call) {
      overlaps.push(job.overlap)
      if (job.overlap !== undefined) await until(() => told.some(({ id }) => id === job.overlap), 'the other node is told')
      return await fakeAdapter.encode(job, call)
    },
    async prepare ({ node, path, body }, { headers }) {
      told.push({ id: headers['x-request-id']!, node: node.id })
      t.same([path, body.media.length], ['/v1/chat/completions', 2])
      throw new Error('no')
    }
  }
  const [encoder, pd] = await Promise.all([FakeNode.start(t, { role: 'encoder' }), FakeNode.start(t)])
  const { url, app } = await buildGateway(t, { options: { adapters: [adapter], nodes: [encoder, pd].map(({ spec }) => ({ ...spec, adapter: 'telling' })), bypass: 'never', retries: 0 } })
  await settled(app.epd.nodes, [encoder, pd])
  const ask = async (): Promise<number> => (await post(`${url}/v1/chat/completions`, chat('?', pictureUrl('a'), pictureUrl('b')))).status
  t.equal(await ask(), 200)
  t.equal(told.length, 1)
  t.equal(told[0]!.node, pd.url)
  t.equal(overlaps[0], told[0]!.id, 'the encoder offers for the request that the node was told of')

  pd.generateFaults.push('endless')
  const stream = await post(`${url}/v1/chat/completions`, { ...chat('?'), stream: true })
  t.equal(await ask(), 200)
  t.same([told.length, overlaps[1]], [1, undefined], 'a node with a stream to serve is left alone')
  await stream.body!.cancel()
  await until(() => app.epd.gateway.registry.snapshot().nodes.every(node => node.load.requests === 0), 'the stream has ended')
  t.equal(await ask(), 200)
  t.equal(told.length, 2)
  t.not(told[1]!.id, told[0]!.id)
  t.equal(app.epd.gateway.registry.snapshot().nodes.filter(node => node.load.failing).length, 0, 'no node is to blame')
})

t.test('what comes late from one encoder does not end the lease that another has given meanwhile', async t => {
  let finish!: (value: never) => void
  const released: string[] = []
  const release = async (leases: ReadonlyArray<{ lease: string }>): Promise<void> => { released.push(...leases.map(one => one.lease)) }
  const stubborn = { ...fakeAdapter, name: 'stubborn', release, encode: () => new Promise<never>(resolve => { finish = resolve }) }
  const prompt = { ...fakeAdapter, name: 'prompt', release }
  const [slow, quick, pd] = await Promise.all([FakeNode.start(t, { role: 'encoder' }), FakeNode.start(t, { role: 'encoder' }), FakeNode.start(t)])
  const nodes = [{ ...slow.spec, adapter: 'stubborn' }, { ...quick.spec, adapter: 'prompt' }, pd.spec]
  const { url, app } = await buildGateway(t, { options: { adapters: [stubborn, prompt, fakeAdapter], nodes, bypass: 'never', timeouts: { encode: 1_500 } } })
  await settled(app.epd.nodes, [slow, quick, pd])
  let open!: () => void
  pd.generateFaults.push({ hold: new Promise(resolve => { open = resolve }) })
  const picture = Array.from({ length: 100 }, (_, seed) => pictureUrl(String(seed)))
    .find(url => rank(fingerprint(Buffer.from(url)), [{ id: slow.url }, { id: quick.url }])[0]!.id === slow.url)!
  const asked = post(`${url}/v1/chat/completions`, chat('?', picture))
  await until(() => pd.generations.length === 1, 'the second encoder has answered, and the language model is asked')
  finish([{ item: 0, node: slow.url, lease: 'late', tokens: 1, cached: false, wire: {} }] as never)
  await until(() => released.length > 0, 'the late lease is released')
  t.strictSame(released, ['late'])
  open()
  t.equal((await asked).status, 200)
  t.strictSame(released, ['late'])
})

t.test('a wait for admission that is too long is a 429 with Retry-After', async t => {
  const f = await fixture(t, { encoders: 1, options: { admission: { visionTokens: 1, wait: 50, retryAfter: 9 } } })
  let release!: () => void
  f.encoders[0]!.encodeFaults.push({ hold: new Promise<void>(resolve => { release = resolve }) })
  const holder = f.ask(pictureUrl('a'))
  await until(() => f.encoders[0]!.calls('/encode').length === 1, 'one is in encode')
  t.equal((await f.ask()).status, 200, 'text does not wait')
  const answer = await f.ask(pictureUrl('b'))
  t.equal(answer.status, 429)
  t.equal(answer.headers.get('retry-after'), '9')
  t.match(await answer.json(), { error: { type: 'rate_limit_error', code: 'rate_limit_exceeded' } })
  release()
  t.equal((await holder).status, 200)
})

t.test('a time limit ends a wait for work that ignores its signal, and hands on what comes late', async t => {
  const parent = new AbortController()
  const soon = new TimeLimit(20, parent.signal)
  const never = new TimeLimit(60_000)
  let finish!: (value: number) => void
  const late = new Promise<number>(resolve => {
    abortable(new Promise<number>(resolve => { finish = resolve }), soon, resolve).then(() => t.fail('was waited for'), (err: Error) => { t.equal(err.name, 'TimeoutError'); finish(7) })
  })
  t.equal(await late, 7)
  t.ok(soon.timedOut && soon.aborted)
  t.notOk(never.aborted)
  never.clear()
  await t.rejects(abortable(Promise.resolve(1), soon), { name: 'TimeoutError' })
  const child = new TimeLimit(0, parent.signal)
  parent.abort(new Error('left'))
  t.match(child.reason, { message: 'left' })
  t.notOk(child.timedOut)
  t.ok(new TimeLimit(0, parent.signal).aborted)
})

t.test('closing lets a stream in flight end within the grace time and refuses new requests', async t => {
  const f = await fixture(t, { options: { timeouts: { grace: 200 } } })
  f.pds[0]!.generateFaults.push('pause')
  const stream = await post(`${f.url}/v1/chat/completions`, { ...chat('?'), stream: true })
  const draining = f.app.epd.gateway.drain()
  const refused = await f.ask()
  t.equal(refused.status, 503)
  t.match(await refused.json(), { error: { code: 'gateway_closing' } })
  t.equal((await fetch(`${f.url}/health`)).status, 503)
  const text = await stream.text()
  t.match(text, /"code":"upstream_broken"/, 'after the grace time the stream is ended properly')
  await draining
})

t.test('app.close() waits for a stream to end by itself', async t => {
  const f = await fixture(t)
  let release!: () => void
  f.pds[0]!.generateFaults.push({ hold: new Promise<void>(resolve => { release = resolve }) })
  const answer = f.ask()
  await until(() => f.pds[0]!.generations.length === 1, 'the request is upstream')
  const closing = f.app.close()
  await until(() => f.app.epd.gateway.draining, 'the gateway drains')
  release()
  t.equal((await answer).status, 200)
  await closing
  t.equal(f.app.epd.gateway.inFlight, 0)
})
