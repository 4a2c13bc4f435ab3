/** What the gateway keeps out, and what it keeps in: rings of gateways, paths, cookies, other origins, bodies that stop. */
import { once } from 'node:events'
import { Agent, createServer, request, type IncomingMessage, type RequestListener } from 'node:http'
import { connect, type AddressInfo } from 'node:net'
import { json, text } from 'node:stream/consumers'
import t, { type Test } from 'tap'
import { buildGateway, chat, post } from '../helper/fake-gateway.ts'
import { FakeNode } from '../helper/fake-node.ts'
import { freePort } from '../helper/free-port.ts'
import { until } from '../helper/until.ts'

const PATH = '/v1/chat/completions'

async function openaiServer (t: Test, answer: RequestListener): Promise<string> {
  const server = createServer((request, response) => {
    if (request.url === '/v1/models') response.setHeader('content-type', 'application/json').end('{"object":"list","data":[{"id":"m"}]}')
    else answer(request, response)
  }).listen(0, '127.0.0.1')
  t.teardown(() => { server.closeAllConnections(); server.close() })
  await once(server, 'listening')
  return `http://127.0.0.1:${(server.address() as AddressInfo).port}`
}

t.test('a gateway among its own nodes is never healthy, and the others serve', async t => {
  const port = await freePort()
  const own = `http://127.0.0.1:${port}`
  const node = await FakeNode.start(t)
  const { url, app } = await buildGateway(t, { nodes: [node], port })
  for (const adapter of ['openai', 'vllm', undefined]) {
    app.epd.nodes.add({ url: own, ...(adapter === undefined ? {} : { adapter }) })
    await app.epd.nodes.waitFor(({ byId }) => byId.get(own)?.state === 'unhealthy', { signal: AbortSignal.timeout(10_000) })
    app.epd.nodes.remove(own)
  }
  app.epd.nodes.add({ url: own, adapter: 'openai', models: ['vlm'] })
  for (let i = 0; i < 4; i++) t.equal((await post(url + PATH, chat('?'))).status, 200)
  t.equal(node.generations.length, 4)
})

t.test('a request that goes round a ring of gateways ends with an error that says so, whatever its route', async t => {
  const ports = await Promise.all([freePort(), freePort()])
  const [one, two] = await Promise.all(ports.map(async (port, i) => {
    const other = { url: `http://127.0.0.1:${ports[1 - i]}`, adapter: 'openai', models: ['m'] }
    return await buildGateway(t, { port, options: { nodes: [other] } })
  })) as [Awaited<ReturnType<typeof buildGateway>>, Awaited<ReturnType<typeof buildGateway>>]
  await Promise.all([one, two].map(async ({ app }) => await app.epd.nodes.waitFor(({ nodes }) => nodes.every(({ state }) => state === 'healthy'), { signal: AbortSignal.timeout(10_000) })))
  for (const [method, path] of [['GET', '/v1/files/1'], ['POST', '/v1/responses/1/cancel']] as const) {
    const answer = await fetch(one.url + path, { method })
    t.equal(answer.status, 508)
    t.match(await answer.json(), { error: { code: 'loop_detected' } })
  }
  for (const stream of [false, true]) {
    const answer = await post(one.url + PATH, { ...chat('?'), model: 'm', stream })
    t.ok(answer.status >= 500, String(answer.status))
    t.match(await answer.text(), /"error"/)
  }
  t.same([one, two].map(({ app }) => app.epd.gateway.inFlight), [0, 0])
})

t.test('gateways in a row serve', async t => {
  const node = await FakeNode.start(t)
  const last = await buildGateway(t, { nodes: [node] })
  const middle = await buildGateway(t, { options: { nodes: [{ url: last.url, adapter: 'openai' }] } })
  const first = await buildGateway(t, { options: { nodes: [{ url: middle.url, adapter: 'openai' }] } })
  await Promise.all([middle, first].map(async ({ app }) => await app.epd.nodes.waitFor(({ models }) => models.length > 0, { signal: AbortSignal.timeout(20_000) })))
  t.equal((await post(first.url + PATH, chat('?'))).status, 200)
})

/** Spellings of a step out of /v1: dots and separators, plain or encoded once, twice or three times, with parameters or without. */
function * steps (): Generator<string> {
  const dots = ['.', '%2e', '%2E', '%252e', '%25252e']
  const separators = ['/', '%2f', '%5c', '%252f', '%255C']
  for (const a of dots) {
    for (const b of dots) {
      for (const separator of separators) for (const parameters of ['', ';', ';x=1', '%3b', '%253Bx']) yield `/v1/files/${a}${b}${parameters}${separator}terminate`
    }
    yield `/v1/${a}/models`
    yield `/v1/files/${a};x/1`
    yield `/v1/files/%25ff/${a}${a}/1`
  }
}

t.test('no path steps out of /v1, however often a proxy in front of a node decodes it', async t => {
  const node = await FakeNode.start(t)
  const { url } = await buildGateway(t, { nodes: [node] })
  const agent = new Agent({ keepAlive: true })
  t.teardown(() => { agent.destroy() })
  // Other clients would walk the path themselves.
  const ask = async (method: string, path: string): Promise<[number | undefined, unknown]> => {
    const [answer] = await once(request(url, { method, path, agent }).end(), 'response') as [IncomingMessage]
    return [answer.statusCode, await json(answer)]
  }
  let tried = 0
  for (const path of steps()) {
    const [status, body] = await ask(tried++ % 2 === 0 ? 'GET' : 'POST', path)
    if (status !== 400 || (body as { error?: { code?: string } }).error?.code !== 'invalid_path') t.fail(`${path}: ${status} ${JSON.stringify(body)}`)
  }
  t.ok(tried > 600)
  t.same(node.generations, [])
  for (const path of ['/v1/files/a%20b', '/v1/files/100%25', '/v1/files/a;b', '/v1/files/.well-known', '/v1/files/a...b']) {
    t.same(await ask('GET', path), [200, { path }])
    t.same(await ask('GET', `http://elsewhere${path}`), [200, { path }], 'a whole URL, as proxies get it')
  }
})

t.test('a path that is encoded again and again is refused after a few rounds', async t => {
  const node = await FakeNode.start(t)
  const { url } = await buildGateway(t, { nodes: [node] })
  for (const times of [5, 6, 100, 3_700]) {
    const [answer] = await once(request(url, { path: `/v1/files/${'/'.repeat(times)}%${'25'.repeat(times)}` }).end(), 'response') as [IncomingMessage]
    t.equal(answer.statusCode, times === 5 ? 200 : 400, `${times} times`)
    const { error } = await json(answer) as { error?: { code: string, message: string } }
    if (times > 5) t.match(error, { code: 'invalid_path', message: /\/v1\/files\/.*encoded more than five times/ })
  }
})

t.test("a node's cookies stay inside", async t => {
  const node = await openaiServer(t, (_request, response) => {
    response.writeHead(200, { 'content-type': 'application/json', 'set-cookie': ['a=1', 'b=2; HttpOnly'], 'x-kept': '1' }).end('{"choices":[{"index":0,"message":{"role":"assistant","content":"?"},"finish_reason":"stop"}]}')
  })
  const { url, app } = await buildGateway(t, { options: { nodes: [{ url: node, adapter: 'openai' }] } })
  await app.epd.nodes.waitFor(({ models }) => models.length > 0)
  for (const answer of [await post(url + PATH, { ...chat('?'), model: 'm' }), await fetch(`${url}/v1/files/1`), await fetch(`${url}/v1/responses/1/cancel`, { method: 'POST' })]) {
    t.equal(answer.status, 200)
    t.equal(answer.headers.get('x-kept'), '1')
    t.equal(answer.headers.get('set-cookie'), null)
  }
})

t.test('a page of another origin manages no nodes, whatever its name; the admin key may', async t => {
  const { app } = await buildGateway(t, { options: { adminKey: 'root', cors: ['*'] } })
  const host = '127.0.0.1:8000'
  const add = async (headers: Record<string, string>, url = '/nodes/add'): Promise<number> =>
    (await app.inject({ method: 'POST', url, payload: { url: 'http://evil.example:1' }, headers: { host, ...headers } })).statusCode
  for (const origin of ['http://evil.example', 'https://evil.example:8000', 'http://localhost:3000', 'http://127.0.0.1:3000', 'http://[::1]:8000', 'null', '']) {
    for (const path of ['/nodes/add', '/nodes/remove', '/nodes/terminate', '/distserve/connection_warmup', '/register_encoder_url']) t.equal(await add({ origin }, path), 403, `${origin} ${path}`)
    t.equal(await add({ origin, 'sec-fetch-site': 'same-origin' }), 403)
  }
  for (const site of ['cross-site', 'same-site']) t.equal(await add({ 'sec-fetch-site': site }), 403, site)
  t.same(app.epd.nodes.snapshot().nodes, [])
  t.equal(await add({ origin: 'http://evil.example', authorization: 'Bearer root' }), 200)
  t.equal(await add({ origin: `http://${host}`, 'sec-fetch-site': 'same-origin' }), 200, 'its own page')
  t.equal(await add({}), 200, 'engines and tools')
})

t.test('a client that stops in the middle of its body is cut off after requestTimeout, and leaves nothing behind', async t => {
  const node = await FakeNode.start(t)
  const { app, url } = await buildGateway(t, {
    nodes: [node],
    fastify: { requestTimeout: 200, http: { connectionsCheckingInterval: 50, headersTimeout: 150 } },
    after: app => { app.post('/own', { config: { epd: true } }, async () => ({})) }
  })
  for (const head of [`POST ${PATH} HTTP/1.1\r\ncontent-type: application/json\r\ncontent-length: 1000`, `POST ${PATH} HTTP/1.1\r\ncontent-type: application/json\r\ntransfer-encoding: chunked`,
    'POST /own HTTP/1.1\r\ncontent-type: application/json\r\ncontent-length: 1000', 'POST /v1/audio/transcriptions HTTP/1.1\r\ncontent-type: multipart/form-data; boundary=x\r\ncontent-length: 1000']) {
    const socket = connect(Number(new URL(url).port), '127.0.0.1')
    socket.write(`${head}\r\nhost: x\r\n\r\n`)
    if (!head.includes('chunked')) socket.write('{"model":')
    t.match(await text(socket), /^HTTP\/1\.1 408 /, head.split('\r\n')[0]!)
  }
  t.equal(app.epd.gateway.inFlight, 0)
  await until(async () => await new Promise(resolve => { app.server.getConnections((_err, count) => { resolve(count === 0) }) }), 'no connection is left')
  t.equal((await post(url + PATH, chat('?'))).status, 200)
})

t.test('pages of the origins that the option names may ask, and no others', async t => {
  const node = await FakeNode.start(t)
  const page = 'http://localhost:3000'
  const { app } = await buildGateway(t, { nodes: [node], options: { cors: [page], apiKeys: ['k'] } })
  const preflight = { origin: page, 'access-control-request-method': 'POST', 'access-control-request-headers': 'authorization,content-type' }
  for (const url of [PATH, '/v1/models', '/v1/completions', '/v1/embeddings', '/v1/files/1']) {
    const asked = await app.inject({ method: 'OPTIONS', url, headers: preflight })
    t.equal(asked.statusCode, 204, url)
    t.match(asked.headers, { 'access-control-allow-origin': page, 'access-control-allow-methods': /POST/, 'access-control-allow-headers': 'authorization,content-type', vary: 'Origin' })
    t.equal((await app.inject({ method: 'OPTIONS', url, headers: { ...preflight, origin: 'http://evil.example' } })).headers['access-control-allow-origin'], undefined)
  }
  const ask = async (origin: string, key = 'k', body: object = chat('?')): Promise<string | undefined> =>
    (await app.inject({ method: 'POST', url: PATH, payload: body, headers: { origin, authorization: `Bearer ${key}` } })).headers['access-control-allow-origin'] as string | undefined
  t.equal(await ask(page), page)
  t.equal(await ask(page, 'wrong'), page, 'errors can be read, too')
  t.equal(await ask(page, 'k', { ...chat('?'), stream: true }), page)
  t.equal(await ask('http://evil.example'), undefined)
  t.equal((await app.inject({ method: 'OPTIONS', url: '/nodes/add', headers: preflight })).statusCode, 404, 'operators\' routes have none')
  const closed = await buildGateway(t, { nodes: [node] })
  t.equal((await closed.app.inject({ method: 'OPTIONS', url: PATH, headers: preflight })).statusCode, 404)
  const open = await buildGateway(t, { nodes: [node], options: { cors: ['*'] } })
  t.equal((await open.app.inject({ method: 'OPTIONS', url: PATH, headers: preflight })).headers['access-control-allow-origin'], '*')
})
