import { once } from 'node:events'
import { createServer, request, type IncomingMessage } from 'node:http'
import type { AddressInfo } from 'node:net'
import { json } from 'node:stream/consumers'
import t from 'tap'
import { metric } from '../helper/metrics.ts'
import { FakeLmdeploy } from '../helper/fake-lmdeploy.ts'
import { fakeAdapter, FakeNode } from '../helper/fake-node.ts'
import { buildGateway, chat, pictureUrl, post } from '../helper/fake-gateway.ts'
import { until } from '../helper/until.ts'

const PATH = '/v1/chat/completions'

t.test('models are merged, listed once, and found by id', async t => {
  const nodes = await Promise.all([FakeNode.start(t, { models: ['org/a', 'vlm'] }), FakeNode.start(t, { models: ['vlm'] }), FakeNode.start(t, { role: 'encoder', models: ['only-e'] })])
  const { url } = await buildGateway(t, { nodes })
  const list = await (await fetch(`${url}/v1/models`)).json() as { object: string, data: Array<{ id: string, object: string, created: number, owned_by: string }> }
  t.equal(list.object, 'list')
  t.same(list.data.map(model => model.id), ['org/a', 'vlm'])
  t.match(list.data[0], { object: 'model', owned_by: 'fastify-epd', created: Number })
  t.match(await (await fetch(`${url}/v1/models/org/a`)).json(), { id: 'org/a' })
  const missing = await fetch(`${url}/v1/models/nope`)
  t.equal(missing.status, 404)
  t.match(await missing.json(), { error: { code: 'model_not_found', param: 'model' } })
})

t.test('other routes reach a node that serves the model, with their bytes as they are', async t => {
  const [a, b] = await Promise.all([FakeNode.start(t, { models: ['a'] }), FakeNode.start(t, { models: ['b'] })])
  const { url } = await buildGateway(t, { nodes: [a, b] })
  t.equal((await post(`${url}/v1/embeddings`, { model: 'b', input: 'x' })).status, 200)
  t.match(b.generations[0], { path: '/v1/embeddings', body: { model: 'b', input: 'x' } })
  t.equal((await post(`${url}/v1/completions`, { model: 'a', prompt: 'x' })).status, 200)
  t.match(a.generations[0], { path: '/v1/completions' })
  const got = await fetch(`${url}/v1/files/1?limit=2`)
  t.match(await got.json(), { path: '/v1/files/1?limit=2' })
  t.equal((await fetch(`${url}/v1/missing`)).status, 404, "a node's own status comes through")
  t.equal((await post(`${url}/v1/embeddings`, { model: 'c' })).status, 404)
})

t.test('no path steps out of /v1, however it is written, and a query is no path', async t => {
  const node = await FakeNode.start(t, { models: ['m'] })
  const { url } = await buildGateway(t, { nodes: [node], after: app => { app.post('/own', async (request, reply) => await app.epd.handle(request, reply)) } })
  const payload = { model: 'm', messages: [] }
  for (const path of ['/v1/../terminate', '/v1/files/..', '/v1/%2e%2E/terminate', '/v1/a/%2e./../x?y=1', '/v1/..%2fterminate', '/v1/..%5cterminate', '/v1/./models']) {
    for (const method of ['GET', 'POST'] as const) {
      // Other clients would walk the path themselves.
      const sent = request(url, { method, path, headers: { 'content-type': 'application/json' } }).end(method === 'POST' ? JSON.stringify(payload) : undefined)
      const [answer] = await once(sent, 'response') as [IncomingMessage]
      t.equal(answer.statusCode, 400, `${method} ${path}`)
      t.match(await json(answer), { error: { code: 'invalid_path', type: 'invalid_request_error' } })
    }
  }
  t.same(node.generations, [])
  t.equal((await fetch(`${url}/v1/files/a..b?next=../c`)).status, 200)
  t.equal((await post(`${url}/own?x=/v1/embeddings`, payload)).status, 200)
  t.same(node.generations.map(({ path }) => path), ['/v1/files/a..b?next=../c', PATH])
})

const STREAM = '/v1/responses/1?stream=true'

t.test('a GET in flight is ended when the grace time of a gateway that closes is over', async t => {
  const node = await FakeNode.start(t)
  const { app, url } = await buildGateway(t, { nodes: [node], options: { timeouts: { grace: 50 } }, fastify: { forceCloseConnections: 'idle' } })
  node.generateFaults.push('endless')
  const answer = await fetch(url + STREAM)
  t.equal(app.epd.gateway.inFlight, 1)
  const closed = app.close()
  t.match(await answer.text(), /upstream_broken/, 'its stream ends properly')
  await closed
  t.equal(app.epd.gateway.inFlight, 0)
})

t.test('a GET may take longer than an answer may be waited for, as long as bytes flow', async t => {
  const node = await FakeNode.start(t)
  const { url } = await buildGateway(t, { nodes: [node], options: { timeouts: { answer: 500 } } })
  node.generateFaults.push('endless')
  const answer = await fetch(url + STREAM)
  let text = ''
  // Sixty events take more than twice as long.
  for await (const chunk of answer.body!.pipeThrough(new TextDecoderStream())) if ((text += chunk).split('data:').length > 60) break
  t.notMatch(text, /upstream_broken/)
})

t.test('a GET that falls silent is ended', async t => {
  const node = await FakeNode.start(t)
  const { url } = await buildGateway(t, { nodes: [node], options: { timeouts: { idle: 50 } } })
  node.generateFaults.push('pause')
  const answer = await fetch(url + STREAM, { signal: AbortSignal.timeout(10_000) })
  t.match(await answer.text(), /upstream_broken/)
})

for (const [what, fault, told] of [['break off', 'half', /upstream_broken/], ['never begin', 'silence', /upstream_timeout/]] as const) {
  t.test(`answers to GET that ${what} open the breaker`, async t => {
    const node = await FakeNode.start(t)
    const { app, url } = await buildGateway(t, { nodes: [node], options: { timeouts: { answer: fault === 'silence' ? 100 : 60_000 } } })
    const state = (): string => app.epd.nodes.snapshot().nodes[0]!.breakers.decode
    for (let i = 0; i < 5; i++) {
      t.equal(state(), 'closed')
      node.generateFaults.push(fault)
      t.match(await (await fetch(url + STREAM)).text(), told)
    }
    t.equal(state(), 'open')
  })
}

t.test('an answer to GET that breaks off after its head is an upstream failure', async t => {
  const server = createServer((request, response) => {
    if (request.url === '/v1/models') { response.setHeader('content-type', 'application/json').end('{"object":"list","data":[{"id":"m"}]}'); return }
    response.writeHead(200, { 'content-type': 'application/json', 'content-length': 10 }).flushHeaders()
    setImmediate(() => response.socket?.resetAndDestroy())
  }).listen(0, '127.0.0.1')
  t.teardown(() => { server.closeAllConnections(); server.close() })
  await once(server, 'listening')
  const { app, url } = await buildGateway(t, { nodes: [], options: { nodes: [{ url: `http://127.0.0.1:${(server.address() as AddressInfo).port}`, adapter: 'openai' }] } })
  await app.epd.nodes.waitFor(({ models }) => models.length > 0)
  const answer = await fetch(`${url}/v1/files/1`)
  t.equal(answer.status, 503)
  t.match(await answer.json(), { error: { code: 'upstream_failed' } })
})

t.test('bad requests are answered in OpenAI shape', async t => {
  const nodes = [await FakeNode.start(t)]
  const { url } = await buildGateway(t, { nodes, options: { limits: { body: 20_000, items: 2 } } })
  const rows: Array<[RequestInit, number, object]> = [
    [{ body: '{"model":"vlm","messages":[}' }, 400, { code: 'invalid_json', message: /byte|offset|position/ }],
    [{ body: '{"messages":[]}' }, 400, { code: 'missing_value', param: 'model' }],
    [{ body: JSON.stringify({ ...chat('?'), model: 'nope' }) }, 404, { code: 'model_not_found', param: 'model', type: 'invalid_request_error' }],
    [{ body: JSON.stringify(chat('?', ...[1, 2, 3].map(i => pictureUrl(i)))) }, 400, { code: 'too_many_media' }],
    [{ body: JSON.stringify(chat('?', pictureUrl(1, 30_000))) }, 413, { code: 'body_too_large' }],
    [{ body: JSON.stringify(chat('?', 'epd:stolen')) }, 400, { param: 'messages[0].content[0]' }],
    [{ body: JSON.stringify(chat('?', pictureUrl(1))) }, 503, { code: 'no_encoder' }],
    [{ body: 'x', headers: { 'content-type': 'text/plain' } }, 415, { code: 'unsupported_media_type' }],
    [{ body: '{}', headers: { 'content-encoding': 'gzip' } }, 415, { code: 'unsupported_content_encoding' }]
  ]
  for (const [init, status, error] of rows) {
    const answer = await post(url + PATH, undefined, init)
    t.equal(answer.status, status, JSON.stringify(error))
    t.match(await answer.json(), { error })
  }
  t.equal(nodes[0]!.generations.length, 0)
})

t.test('control fields of a client never go upstream', async t => {
  const pd = await FakeNode.start(t)
  const { url } = await buildGateway(t, { nodes: [pd] })
  await post(url + PATH, { ...chat('?'), encoder_result: [1], migration_request: {}, with_cache: true, temperature: 0.5 })
  t.same(Object.keys(pd.generations[0]!.body).sort(), ['messages', 'model', 'temperature'])
})

t.test("node management speaks LMDeploy's shapes and strings, and answers before the node listens", async t => {
  const { url, app } = await buildGateway(t)
  const call = async (path: string, body: unknown): Promise<[number, unknown, Headers]> => {
    const answer = await post(url + path, body)
    return [answer.status, await answer.json(), answer.headers]
  }
  const [status, text, headers] = await call('/nodes/add', { url: 'http://127.0.0.1:9/', status: { role: 2, models: ['m'], unfinished: 0, latency: [] } })
  t.equal(status, 200)
  t.equal(text, 'Added successfully')
  t.equal(app.epd.nodes.isNodeToken(headers.get('x-epd-node-token')!), 'http://127.0.0.1:9/', 'the token is of this node, whose id is its URL byte for byte')
  t.match(await (await fetch(`${url}/nodes/status`)).json(), { 'http://127.0.0.1:9/': { role: 2, models: ['m'], unfinished: 0, latency: [], speed: null } })
  t.equal((await call('/nodes/add', { url: 'ftp://x' }))[1], 'Failed to add, please check the input url.')
  t.equal((await call('/nodes/add', { url: 'http://a:1', status: null }))[1], 'Added successfully')
  t.match((await call('/nodes/add', { url: 'http://a:1', status: { role: 'Encoder' } })).slice(0, 2), [400, { error: { code: 'invalid_body' } }])
  t.equal((await call('/nodes/remove', { url: 'http://a:1' }))[1], 'Deleted successfully')
  t.equal((await call('/nodes/remove', { url: 'http://a:1' }))[1], 'Failed to delete, please check the input url.')
  t.equal((await call('/nodes/terminate', { url: 'http://nobody:1' }))[1], 'Failed to terminate node http://nobody:1')
  t.same((await call('/distserve/connection_warmup', {}))[1], { SUCCESS: true })
  t.equal((await fetch(`${url}/nodes/add`, { method: 'POST', body: '{"url":"http://a:1"}' })).status, 415, 'a page in a browser can not register a node')
})

t.test('nodes/add refuses what it does not take, and names it', async t => {
  const { url, app } = await buildGateway(t)
  for (const [param, body] of [
    ['role', { url: 'http://a:1', role: 'encoder' }],
    ['adapter', { url: 'http://a:1', status: { role: 4, adapter: 'vllm' } }],
    ['status/role', { url: 'http://a:1', status: { role: 5 } }],
    ['status/models', { url: 'http://a:1', status: { models: {} } }],
    ['status/speed', { url: 'http://a:1', status: { speed: 0 } }]
  ] as const) {
    const answer = await post(`${url}/nodes/add`, body)
    t.match([answer.status, await answer.json()], [400, { error: { code: 'invalid_body', message: new RegExp(param) } }], param)
  }
  t.equal(app.epd.nodes.get('http://a:1'), undefined)
})

t.test('a node that registers is probed, linked and used', async t => {
  const [encoder, pd] = await Promise.all([FakeNode.start(t, { role: 'encoder' }), FakeNode.start(t)])
  const { url, app } = await buildGateway(t, { options: { bypass: 'never' } })
  for (const node of [encoder, pd]) app.epd.nodes.add(node.spec)
  await until(async () => (await post(url + PATH, chat('?', pictureUrl(1)))).headers.get('x-epd-plan') === 'e-pd', 'the plan is e-pd')
  t.same(await (await post(`${url}/distserve/connection_warmup`, {})).json(), { SUCCESS: true })
})

for (const backend of ['pytorch', 'turbomind'] as const) {
  t.test(`lmdeploy api_server (${backend}) through the gateway: it registers before it listens, serves, vanishes, is kept, and returns`, async t => {
    const { url } = await buildGateway(t)
    const fake = new FakeLmdeploy({ proxyUrl: url, backend, answer: 'a cat' })
    t.teardown(() => fake.close())
    const picture = pictureUrl(1)
    const body = { ...chat('What is it?', picture), model: fake.model, migration_request: { protocol: 1 }, with_cache: true, preserve_cache: true, encoder_result: [] }
    const ask = async (): Promise<Response> => await post(url + PATH, body)
    const health = async (): Promise<unknown> => (await (await fetch(`${url}/nodes/status`)).json() as Record<string, { health: string }>)[fake.url]?.health
    t.equal((await ask()).status, 503, 'no node is there yet')
    await fake.comeBack()
    await until(async () => await health() === 'healthy', 'it is healthy')
    const served = await ask()
    t.equal(served.status, 200, 'a migration request in it would have hung')
    t.equal(served.headers.get('x-epd-plan'), 'hybrid')
    t.match(await served.json(), { choices: [{ message: { content: 'a cat' } }] })
    const { messages, model, ...rest } = fake.generations()[0]!.body as Record<string, any>
    t.strictSame(messages, chat('What is it?', picture).messages, 'with its pixels')
    t.strictSame(rest, {}, 'and without what a client has no business to send')
    await fake.vanish()
    const gone = await ask()
    t.equal(gone.status, 503)
    t.ok(gone.headers.get('retry-after'))
    t.equal(await health(), 'unhealthy', 'it is kept')
    await fake.comeBack()
    await until(async () => (await ask()).status === 200, 'it serves again')
  })
}

t.test('node management is for loopback, allowed networks and the admin key', async t => {
  const { app } = await buildGateway(t, { options: { adminKey: 'root', allowedNetworks: ['10.1.0.0/16', 'fd00::/8', '192.0.2.7'] } })
  const status = async (remoteAddress: string, headers: Record<string, string> = {}): Promise<number> =>
    (await app.inject({ url: '/nodes/status', remoteAddress, headers })).statusCode
  t.equal(await status('127.0.0.1'), 200)
  t.equal(await status('::1'), 200)
  t.equal(await status('::ffff:127.0.0.1'), 200)
  t.equal(await status('10.1.2.3'), 200)
  t.equal(await status('fd00::7'), 200)
  t.equal(await status('192.0.2.7'), 200)
  t.equal(await status('10.2.2.3'), 403)
  t.equal(await status('10.2.2.3', { authorization: 'Bearer root' }), 200)
  t.equal(await status('10.2.2.3', { authorization: 'Bearer toor' }), 403)
  t.equal(await status('127.0.0.1', { 'x-forwarded-for': '8.8.8.8' }), 403, 'behind a proxy no client is loopback')
  t.equal((await app.inject({ url: '/epd/traces', remoteAddress: '8.8.8.8' })).statusCode, 403)
  t.equal((await app.inject({ url: '/metrics', remoteAddress: '8.8.8.8' })).statusCode, 200)
  const trusting = await buildGateway(t, { fastify: { trustProxy: true } })
  t.equal((await trusting.app.inject({ url: '/nodes/status', headers: { 'x-forwarded-for': '8.8.8.8' } })).statusCode, 403)
  t.equal((await trusting.app.inject({ url: '/nodes/status', headers: { 'x-forwarded-for': '127.0.0.1' } })).statusCode, 200)
})

t.test('a page whose name resolves to this machine (DNS rebinding) manages no nodes; engines and tools may use any name', async t => {
  const { app } = await buildGateway(t)
  const add = async (headers: Record<string, string>): Promise<number> =>
    (await app.inject({ method: 'POST', url: '/nodes/add', payload: { url: 'http://evil.example:1' }, headers })).statusCode
  t.equal(await add({ host: 'evil.example:8000', origin: 'http://evil.example:8000' }), 403)
  t.equal(await add({ host: 'evil.example:8000', 'sec-fetch-site': 'same-origin' }), 403)
  t.same(app.epd.nodes.snapshot().nodes, [])
  const look = async (headers: Record<string, string>): Promise<number> => (await app.inject({ url: '/epd/traces', headers })).statusCode
  t.equal(await look({ host: 'evil.example:8000', 'user-agent': 'Mozilla/5.0' }), 403)
  t.equal(await look({ host: '127.0.0.1:8000', 'user-agent': 'Mozilla/5.0' }), 200)
  t.equal(await add({ host: 'gateway.internal:8000' }), 200)
})

t.test('health is readiness: 503 until a node can answer', async t => {
  const { url, app } = await buildGateway(t)
  const before = await fetch(`${url}/health`)
  t.equal(before.status, 503)
  t.match(await before.json(), { status: 'no_healthy_node', nodes: { healthy: 0, total: 0 } })
  t.match(await (await post(url + PATH, chat('?'))).json(), { error: { code: 'no_healthy_node' } })
  app.epd.nodes.add((await FakeNode.start(t)).spec)
  await until(async () => (await fetch(`${url}/health`)).status === 200, 'the gateway is healthy')
})

t.test('the log gives the reason of a failed request in one line, and a stack only for unexpected errors', async t => {
  const lines: Array<Record<string, any>> = []
  const node = await FakeNode.start(t)
  const options = { logger: { level: 'error', stream: { write (line: string) { lines.push(JSON.parse(line)) } } } }
  const { url, app } = await buildGateway(t, { nodes: [node], fastify: options, options: { retries: 0 } })
  node.generateFaults.push('failed')
  t.equal((await post(url + PATH, chat('?'))).status, 500)
  t.match(lines[0], { msg: 'request failed', upstream: 500, node: node.url, reason: String })
  app.epd.nodes.remove(node.url)
  t.equal((await post(url + PATH, chat('?'))).status, 503)
  t.match(lines[1], { msg: 'request failed', code: 'EPD_ERR_NO_NODE' })
  for (const line of lines) t.notOk('err' in line)
  app.epd.gateway.registry.snapshot = () => { throw new TypeError('a fault in the gateway') }
  t.equal((await post(url + PATH, chat('?'))).status, 500)
  t.match(lines[2], { msg: 'request failed', code: 'EPD_ERR_INTERNAL', err: { message: 'a fault in the gateway', stack: /TypeError/ } })
})

t.test('the log names the adapter and the function that threw something else than it should, once', async t => {
  const lines: Array<Record<string, any>> = []
  const node = await FakeNode.start(t)
  const broken = { ...fakeAdapter, name: 'broken', generate: async () => { throw new TypeError('oops') } }
  const { url } = await buildGateway(t, {
    nodes: [node],
    fastify: { logger: { level: 'error', stream: { write (line: string) { lines.push(JSON.parse(line)) } } } },
    options: { retries: 0, adapters: [broken], nodes: [{ ...node.spec, adapter: 'broken' }] }
  })
  t.equal((await post(url + PATH, chat('?'))).status, 503)
  t.equal(lines[0]!.reason, `adapter function broken.generate failed on an answer of ${node.url}: TypeError: oops`)
})

t.test('metrics count what happened', async t => {
  const nodes = await Promise.all([FakeNode.start(t, { role: 'encoder' }), FakeNode.start(t)])
  const { url } = await buildGateway(t, { nodes, options: { bypass: 'never' } })
  nodes[1]!.generateFaults.push('gone')
  await post(url + PATH, chat('?', pictureUrl(1), pictureUrl(2)))
  await post(url + PATH, chat('?'))
  await post(url + PATH, { ...chat('?'), model: 'x' })
  const answer = await fetch(`${url}/metrics`)
  t.match(answer.headers.get('content-type'), /^text\/plain; version=0\.0\.4/)
  const text = await answer.text()
  t.equal(metric(text, 'epd_requests_total', { epd_topology: 'e-pd', epd_outcome: 'ok' }), 1)
  t.equal(metric(text, 'epd_requests_total', { epd_topology: 'pd', epd_outcome: 'ok' }), 1)
  t.equal(metric(text, 'epd_requests_total', { epd_topology: 'none', epd_outcome: 'refused' }), 1)
  t.equal(metric(text, 'epd_retries_total'), 1)
  t.equal(metric(text, 'epd_gateway_encoded_items_total'), 4)
  t.equal(metric(text, 'epd_requests_in_flight'), 0)
  t.equal(metric(text, 'epd_node_up', { epd_node: nodes[0]!.url }), 1)
})
