import { request as httpRequest } from 'node:http'
import t, { type Test } from 'tap'
import { AdapterError, type Adapter } from '../../adapters/adapter.ts'
import type { EpdOptions } from '../../plugin/index.ts'
import { fakeAdapter, FakeNode, type FakeNodeOptions } from '../helper/fake-node.ts'
import { buildGateway, chat, pictureUrl, post, type FakeGateway } from '../helper/fake-gateway.ts'
import { until } from '../helper/until.ts'

/** Prefill and decode on two nodes: P -> D and E -> P -> D. */

interface Setup {
  readonly encoders?: number
  readonly prefills?: number
  readonly decodes?: number
  readonly hybrids?: number
  readonly prefill?: FakeNodeOptions
  readonly decode?: FakeNodeOptions
  readonly options?: EpdOptions
}

interface Fixture extends FakeGateway {
  readonly encoders: FakeNode[]
  readonly prefills: FakeNode[]
  readonly decodes: FakeNode[]
  readonly hybrids: FakeNode[]
  /** About pictures, or with a text of its own. */
  ask (...urls: string[]): Promise<Response>
}

async function fixture (t: Test, { encoders = 0, prefills = 1, decodes = 1, hybrids = 0, prefill = {}, decode = {}, options = {} }: Setup = {}): Promise<Fixture> {
  const start = async (count: number, node: FakeNodeOptions): Promise<FakeNode[]> => await Promise.all(Array.from({ length: count }, () => FakeNode.start(t, node)))
  const found = {
    encoders: await start(encoders, { role: 'encoder' }),
    prefills: await start(prefills, { ...prefill, role: 'prefill' }),
    decodes: await start(decodes, { ...decode, role: 'decode' }),
    hybrids: await start(hybrids, { vision: 'full' })
  }
  const gateway = await buildGateway(t, { nodes: Object.values(found).flat(), options: { bypass: 'never', ...options } })
  return { ...gateway, ...found, ask: (...said) => post(`${gateway.url}/v1/chat/completions`, said[0]?.startsWith('data:') === false ? chat(said[0]) : chat('?', ...said)) }
}

/** Nothing is left of any request. */
async function atRest (f: Fixture): Promise<void> {
  const { gateway } = f.app.epd
  await until(() => gateway.inFlight === 0, 'the gateway is at rest')
  await until(() => gateway.registry.snapshot().nodes.every(node => node.load.requests === 0 && node.load.tokens === 0), 'no node has load')
  await until(() => f.prefills.every(node => node.handoffs.size === 0), 'no KV blocks are kept')
}

/** Leases of KV blocks that a prefill node was asked to free, once for each call. */
const freed = (f: Fixture): string[] => f.prefills.flatMap(node => node.released)

t.test('text goes P -> D: D takes over under P\'s lease, and the gateway does not free what D has', async t => {
  const f = await fixture(t)
  const answer = await f.ask()
  t.equal(answer.status, 200)
  t.equal(answer.headers.get('x-epd-plan'), 'p-d')
  t.equal(answer.headers.get('x-epd-reason'), 'no node does both')
  t.match(await answer.json(), { choices: [{ message: { content: 'hello' } }] })
  const [p, d] = [f.prefills[0]!, f.decodes[0]!]
  t.match(p.prefills[0]!.body, { decode: d.url, path: '/v1/chat/completions', features: [] })
  t.match(d.generations[0]!.body.handoff, { node: p.url })
  t.match(p.prefills[0]!.headers['x-request-id'], /\.p$/)
  t.match(d.generations[0]!.headers['x-request-id'], /[^p]$/)
  await atRest(f)
  t.same(freed(f), [])
})

t.test('a picture goes E -> P -> D: features to P, not to D', async t => {
  const f = await fixture(t, { encoders: 1 })
  const answer = await f.ask(pictureUrl('a'))
  t.equal(answer.headers.get('x-epd-plan'), 'e-p-d')
  t.equal(answer.headers.get('x-epd-encoders'), f.encoders[0]!.url)
  t.equal(f.prefills[0]!.prefills[0]!.body.features.length, 1)
  t.equal(f.decodes[0]!.generations[0]!.body.features, undefined)
  t.equal(f.app.epd.gateway.registry.snapshot().link(f.encoders[0]!.url, f.prefills[0]!.url), 'linked')
  await atRest(f)
  t.same([...freed(f), ...f.encoders[0]!.released], [])
})

for (const how of ['reset', 'failed', 'busy'] as const) {
  t.test(`D is ${how} before its first byte: the answer comes from another pair, P's blocks are freed once`, async t => {
    const f = await fixture(t, { decodes: 2 })
    const first = f.decodes[0]!
    // A kept connection that is reset is tried once more on a fresh one.
    first.generateFaults.push(...how === 'reset' ? [how, how] as const : [how])
    const answer = await f.ask()
    t.equal(answer.status, 200)
    t.equal(answer.headers.get('x-epd-plan'), 'p-d')
    t.equal(f.decodes[1]!.generations.length, 1)
    t.equal(f.prefills[0]!.prefills.length, 2, 'the whole request again')
    t.equal(f.app.epd.gateway.stats.retries, 1)
    await until(() => f.app.epd.gateway.inFlight === 0 && freed(f).length === 1, 'the lease of the first attempt is freed')
    await f.app.close()
    t.same(freed(f), ['kv-' + new URL(f.prefills[0]!.url).port + '-1'], 'and nothing else is')
  })
}

t.test("D dies under the request: it goes to no other pair, and P's blocks are freed", async t => {
  const f = await fixture(t, { decodes: 2 })
  const first = f.decodes[0]!
  let release!: () => void
  first.generateFaults.push({ hold: new Promise<void>(resolve => { release = resolve }) })
  const asked = f.ask()
  await until(() => first.generations.length === 1, 'D has been called')
  await first.close()
  release()
  const answer = await asked
  t.equal(answer.status, 502)
  t.match(await answer.json(), { error: { code: 'node_died' } })
  t.equal(f.decodes[1]!.generations.length, 0)
  t.equal(f.app.epd.gateway.stats.retries, 0)
  await until(() => f.app.epd.gateway.inFlight === 0 && freed(f).length === 1, 'the lease is freed')
})

t.test('P is killed after its answer: D can\'t pull, the whole request goes to another P', async t => {
  const f = await fixture(t, { prefills: 2 })
  const [p, other] = f.prefills as [FakeNode, FakeNode]
  let release!: () => void
  f.decodes[0]!.generateFaults.push({ hold: new Promise<void>(resolve => { release = resolve }) })
  const asked = f.ask()
  await until(() => f.decodes[0]!.generations.length === 1, 'D has been called')
  await p.close()
  release()
  const answer = await asked
  t.equal(answer.status, 200)
  t.equal(other.prefills.length, 1)
  t.equal(f.decodes[0]!.generations.length, 2)
  await atRest({ ...f, prefills: [other] })
  t.same(other.released, [])
})

t.test('KV blocks that are gone: the link is made again, the request starts again as often as retries says, then the client gets an error', async t => {
  const f = await fixture(t)
  const p = f.prefills[0]!
  const forget = async (nth: number): Promise<void> => {
    let release!: () => void
    f.decodes[0]!.generateFaults.push({ hold: new Promise<void>(resolve => { release = resolve }) })
    await until(() => f.decodes[0]!.generations.length === nth, 'D has been called')
    p.handoffs.clear()
    release()
  }
  const asked = f.ask()
  await forget(1)
  t.equal((await asked).status, 200)
  t.equal(p.prefills.length, 2)
  t.ok(f.decodes[0]!.calls('/link').length > 1, 'linked again')

  const again = f.ask()
  await forget(3)
  await forget(4)
  await forget(5)
  const failed = await again
  t.equal(failed.status, 503)
  t.match(await failed.json(), { error: { code: 'kv_gone' } })
  t.ok(failed.headers.get('retry-after'))
  await atRest(f)
})

t.test('KV blocks that arrive corrupt: another P is asked, the link stays', async t => {
  const f = await fixture(t, { prefills: 2 })
  f.decodes[0]!.generateFaults.push('corrupt')
  t.equal((await f.ask()).status, 200)
  t.same(f.prefills.map(p => p.prefills.length), [1, 1])
  t.equal(f.decodes[0]!.calls('/link').length, 2)
  await atRest(f)
  t.equal(freed(f).length, 1)
})

for (const fault of ['reset', 'failed', 'busy'] as const) {
  t.test(`P is ${fault}: another P takes the request, features and all`, async t => {
    const f = await fixture(t, { encoders: 1, prefills: 2 })
    f.prefills[0]!.prefillFaults.push(...fault === 'reset' ? [fault, fault] as const : [fault])
    const answer = await f.ask(pictureUrl('a'))
    t.equal(answer.status, 200)
    t.equal(f.prefills[1]!.prefills.length, 1)
    t.equal(f.decodes[0]!.generations.length, 1)
    await until(() => f.encoders[0]!.released.length === 1, 'the features of the first attempt are released')
    await atRest(f)
  })
}

t.test('a P that hangs counts as dead after its timeout and gets an abort', async t => {
  const f = await fixture(t, { prefills: 2, options: { timeouts: { prefill: 1_000 } } })
  f.prefills[0]!.prefillFaults.push('silence')
  const answer = await f.ask()
  t.equal(answer.status, 200)
  t.equal(f.prefills[1]!.prefills.length, 1)
  await until(() => f.prefills[0]!.abortedRequests.length === 1, 'the hanging node got an abort')
  t.equal(f.prefills[0]!.abortedRequests[0], f.prefills[0]!.prefills[0]!.headers['x-request-id'])

  for (const p of f.prefills) p.prefillFaults.push('silence')
  const failed = await f.ask()
  t.equal(failed.status, 504)
  t.match(await failed.json(), { error: { code: 'upstream_timeout' } })
  await atRest(f)
})

t.test('P\'s own 4xx comes through as it is; features that P could not pull start again at the plan', async t => {
  const f = await fixture(t, { encoders: 1 })
  f.prefills[0]!.prefillFaults.push('rejected')
  const answer = await f.ask(pictureUrl('a'))
  t.equal(answer.status, 400)
  t.match(await answer.json(), { error: { code: 'invalid_media' } })
  t.equal(f.prefills[0]!.prefills.length, 1)
  f.prefills[0]!.prefillFaults.push('gone')
  t.equal((await f.ask(pictureUrl('a'))).status, 200)
  t.equal(f.prefills[0]!.prefills.length, 3)
  await atRest(f)
})

t.test('D\'s own 4xx comes through, and P\'s blocks are freed once', async t => {
  const f = await fixture(t)
  f.decodes[0]!.generateFaults.push('rejected')
  t.equal((await f.ask()).status, 400)
  await atRest(f)
  t.equal(freed(f).length, 1)
})

t.test('encoders fail: P encodes by itself when it can see', async t => {
  const f = await fixture(t, { encoders: 1, prefill: { vision: 'full' } })
  f.encoders[0]!.encodeFaults.push('failed')
  const answer = await f.ask(pictureUrl('a'))
  t.equal(answer.headers.get('x-epd-plan'), 'p-d')
  t.equal(answer.headers.get('x-epd-reason'), 'encoders failed')
  t.same(f.prefills[0]!.prefills[0]!.body.features, [])
  const blind = await fixture(t, { encoders: 1 })
  blind.encoders[0]!.encodeFaults.push('failed')
  t.equal((await blind.ask(pictureUrl('a'))).status, 503)
})

t.test('a client that leaves frees everything once, wherever its request is', async t => {
  const f = await fixture(t)
  const [p, d] = [f.prefills[0]!, f.decodes[0]!]
  let begun = false
  const leave = async (stream: boolean, ready: () => unknown): Promise<void> => {
    const { hostname, port } = new URL(f.url)
    const request = httpRequest({ hostname, port, path: '/v1/chat/completions', method: 'POST', headers: { 'content-type': 'application/json' } })
    request.on('error', () => {}).on('response', response => { response.on('error', () => {}).once('data', () => { begun = true }) })
    request.end(JSON.stringify({ ...chat('?'), stream }))
    await until(ready, 'the request is where it should be')
    request.destroy()
    await until(() => f.app.epd.gateway.inFlight === 0, 'the request has ended')
  }

  p.prefillFaults.push('silence')
  await leave(false, () => p.prefills.length === 1)
  await until(() => p.prefills[0]!.aborted && p.abortedRequests.length === 1, 'P got an abort')
  t.equal(d.generations.length, 0)

  d.generateFaults.push('silence')
  await leave(false, () => d.generations.length === 1)
  await until(() => p.released.length === 1 && p.handoffs.size === 0, 'P\'s blocks are freed')
  await until(() => d.generations[0]!.aborted && d.abortedRequests.length === 1, 'D got an abort')

  d.generateFaults.push('pause')
  await leave(true, () => begun)
  await until(() => d.generations[1]!.aborted, 'the stream was broken off')
  await atRest(f)
  t.equal(p.released.length, 1, 'what D has pulled is not freed again')
})

t.test('what P and D can\'t share goes to a hybrid, or is refused by name', async t => {
  const f = await fixture(t, { hybrids: 1, options: { routing: { disaggregate: 'always' } } })
  const bodies: Array<[string, object, string]> = [
    ['/v1/chat/completions', { ...chat('?'), n: 2 }, 'n'],
    ['/v1/completions', { model: 'vlm', prompt: 'x', best_of: 3 }, 'best_of'],
    ['/v1/completions', { model: 'vlm', prompt: ['x', 'y'] }, 'prompt']
  ]
  for (const [path, body] of bodies) t.equal((await post(f.url + path, body)).headers.get('x-epd-plan'), 'pd', JSON.stringify(body))
  for (const body of [{ prompt: ['x'] }, { prompt: [1, 2, 3] }, { prompt: 'x', n: 1 }]) {
    t.equal((await post(`${f.url}/v1/completions`, { model: 'vlm', ...body })).headers.get('x-epd-plan'), 'p-d', JSON.stringify(body))
  }
  t.equal((await post(`${f.url}/v1/responses`, { model: 'vlm', input: 'x' })).headers.get('x-epd-reason'), 'text only, this route')
  t.equal(f.hybrids[0]!.generations.length, 4)

  const disaggregated = await fixture(t)
  for (const [path, body, param] of bodies) {
    const answer = await post(disaggregated.url + path, body)
    t.equal(answer.status, 400)
    t.match(await answer.json(), { error: { type: 'invalid_request_error', code: 'unsupported_value', param, message: /needs a node that does both/ } })
  }
  t.match(await (await post(`${disaggregated.url}/v1/responses`, { model: 'vlm', input: 'x' })).json(), { error: { code: 'unsupported_value', param: null } })
  t.equal((await fetch(`${disaggregated.url}/v1/files`)).status, 200, 'a request that names no model finds a node')
  t.equal((await fetch(`${disaggregated.url}/health`)).status, 200)
})

t.test('requests of one moment do not all choose the same D, and long prompts spread over P', async t => {
  const f = await fixture(t, { encoders: 1, prefills: 2, decodes: 2 })
  let release!: () => void
  const hold = new Promise<void>(resolve => { release = resolve })
  for (const p of f.prefills) p.prefillFaults.push({ hold }, { hold })
  const long = f.ask('x'.repeat(9_000))
  const asked = [long]
  await until(() => f.prefills[0]!.prefills.length === 1, 'the long prompt is at P')
  for (let i = 1; i < 4; i++) {
    asked.push(f.ask())
    await until(() => f.prefills.flatMap(p => p.prefills).length === i + 1, 'the next one is at P')
  }
  t.same(f.prefills.map(p => p.prefills.length), [1, 3], 'short prompts go around the long one')
  release()
  await Promise.all(asked)
  t.same(f.decodes.map(d => d.generations.length), [1, 3], 'and so at D')
  await atRest(f)

  f.encoders[0]!.encodeFaults.push({ hold: new Promise<void>(resolve => { release = resolve }) })
  const picture = f.ask(pictureUrl('a'))
  await until(() => f.encoders[0]!.calls('/encode').length === 1, 'a picture is at E')
  const loads = f.app.epd.nodes.snapshot().nodes.map(({ role, load }) => [role, load.requests, load.tokens > 0])
  t.same(loads, [['encoder', 1, true], ['prefill', 1, true], ['prefill', 0, false], ['decode', 1, false], ['decode', 0, false]], 'P and D are in use from the plan on')
  release()
  t.equal((await picture).status, 200)
  await atRest(f)
})

t.test('a P whose adapter ignores its signal delays no request, and what it hands off late is freed', async t => {
  let finish!: (value: never) => void
  const released: string[] = []
  const adapter: Adapter = {
    ...fakeAdapter,
    name: 'stubborn',
    prefill: () => new Promise<never>(resolve => { finish = resolve }),
    async release (leases) { released.push(...leases.map(one => one.lease)) }
  }
  const nodes = await Promise.all((['prefill', 'decode'] as const).map(role => FakeNode.start(t, { role })))
  const { url } = await buildGateway(t, { nodes, options: { adapters: [adapter], nodes: nodes.map(({ url, role }) => ({ url, role, adapter: 'stubborn' })), retries: 0, timeouts: { prefill: 50 } } })
  t.equal((await post(`${url}/v1/chat/completions`, chat('?'))).status, 504)
  finish({ node: nodes[0]!.url, lease: 'late', wire: {} } as never)
  await until(() => released.length > 0, 'the late hand-off is freed')
  t.same(released, ['late'])
})

t.test('a P that can work with no D has its links refused, and the request goes elsewhere', async t => {
  const adapter: Adapter = { ...fakeAdapter, name: 'odd', prefill: async ({ node }) => { throw new AdapterError('REFUSED', 'names no session', { node: node.id }) } }
  const [p, d, hybrid] = [await FakeNode.start(t, { role: 'prefill' }), await FakeNode.start(t, { role: 'decode' }), await FakeNode.start(t)]
  const nodes = [p, d, hybrid].map(({ url, role }) => ({ url, role, adapter: 'odd' }))
  const { app, url } = await buildGateway(t, { nodes: [p, d, hybrid], options: { adapters: [adapter], nodes, routing: { disaggregate: 'always' } } })
  const answer = await post(`${url}/v1/chat/completions`, chat('?'))
  t.equal(answer.status, 200)
  t.equal(answer.headers.get('x-epd-plan'), 'pd')
  const status = app.epd.nodes.status()[p.url]!
  t.match(status.links[d.url], { state: 'refused', reason: 'names no session' })
  t.match(status.notes, ['not used by plans: names no session'])
  t.equal((await post(`${url}/v1/chat/completions`, chat('?'))).headers.get('x-epd-reason'), 'text only, no decode node fits a prefill node')
})

t.test('a request that P finds it can\'t share costs no retry', async t => {
  const adapter: Adapter = { ...fakeAdapter, name: 'odd', prefill: async ({ node }) => { throw new AdapterError('KV_GONE', 'first token is last', { node: node.id, singleNode: true }) } }
  const [p, d] = [await FakeNode.start(t, { role: 'prefill' }), await FakeNode.start(t, { role: 'decode', standalone: true })]
  const nodes = [p, d].map(({ url, role }) => ({ url, role, adapter: 'odd' }))
  const { app, url } = await buildGateway(t, { nodes: [p, d], options: { adapters: [adapter], nodes, retries: 0 } })
  const answer = await post(`${url}/v1/chat/completions`, chat('?'))
  t.equal(answer.status, 200)
  t.equal(answer.headers.get('x-epd-plan'), 'pd')
  t.equal(d.generations[0]!.body.handoff, undefined)
  t.equal(app.epd.nodes.get(p.url)!.breakers.prefill, 'closed')
})
