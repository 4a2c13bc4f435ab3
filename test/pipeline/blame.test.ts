/** Who is to blame for what goes wrong, and what the client sees of it. Cases that users reported stand beside their kind. */
import { readFileSync } from 'node:fs'
import type { ServerResponse } from 'node:http'
import { createServer } from 'node:net'
import { once } from 'node:events'
import { join } from 'node:path'
import type { AddressInfo } from 'node:net'
import t from 'tap'
import { AnswerStream } from '../../plugin/pipeline/answer-stream.ts'
import { BLAME, outcomeOfStatus, treatmentOf } from '../../plugin/pipeline/blame.ts'
import { buildGateway, post } from '../helper/fake-gateway.ts'
import { ask, CHUNK, COMPLETION, gatewayFor, json, modelServer, well, type Script } from '../helper/model-server.ts'
import { packageRoot } from '../helper/package-root.ts'
import { until } from '../helper/until.ts'

t.test('docs/errors.md prints the table', async t => {
  const page = readFileSync(join(packageRoot(), 'docs/errors.md'), 'utf8')
  const client = (seen: string): string => seen === 'as it came' ? seen : `\`${seen}\``
  for (const [outcome, row] of Object.entries(BLAME)) {
    const line = `| ${row.what} | ${row.counts} | ${row.again} | ${client(row.client)} |`
    t.ok(page.includes(line), `${outcome}: ${line}`)
    const { counts, again, client: seen } = treatmentOf(outcome as keyof typeof BLAME, 'encode')
    const encode = `${counts}, ${again}, ${client(seen)}`
    if ('encode' in row) t.ok(page.includes(`| ${outcome} | ${encode} |`), `encode: | ${outcome} | ${encode} |`)
  }
})

const STATUSES = [400, 401, 402, 403, 404, 405, 408, 409, 410, 413, 418, 422, 424, 429, 451, 499, 500, 501, 502, 503, 504, 507, 529]
const ROUTES = ['/v1/chat/completions', '/v1/completions', '/v1/embeddings', '/v1/rerank', '/v1/responses']

t.test('a whole answer with a status never opens a breaker, on no route, and reaches the client with what it says', async t => {
  let status = 0
  const error = { message: 'why', type: 'its_type', code: 'its_code', param: null }
  const node = await modelServer(t, (request, response, body, server) => {
    if (body.user === 'well') { well(request, response, body, server); return }
    json(response, status, { error }, { 'retry-after': '7', 'x-ratelimit-reset-requests': '7s', 'x-own': 'yes' })
  })
  const { post, app } = await gatewayFor(t, [node])
  for (status of STATUSES) {
    for (const path of ROUTES) {
      node.asked = 0
      const { status: seen, body, headers } = await post(ask({ user: 'ill', input: 'x' }), path)
      const { client } = treatmentOf(outcomeOfStatus(status), 'decode')
      if (client === 'as it came') {
        t.match({ seen, body, again: headers.get('retry-after'), limit: headers.get('x-ratelimit-reset-requests'), own: headers.get('x-own') },
          { seen: status, body: { error }, again: '7', limit: '7s', own: 'yes' }, `${status} ${path}`)
      } else t.match([seen, body.error.code], [503, 'upstream_failed'], `${status} ${path}`)
      t.ok(node.asked <= 3, 'asked no more than three times')
      if (client === 'as it came') t.equal(node.asked, 1, 'a node that has answered is not asked the same again')
    }
  }
  t.equal((await post(ask({ user: 'well' }))).status, 200)
  t.match(app.epd.gateway.registry.status()[node.url]?.breakers, { decode: 'closed' })
  t.match(await (await fetch(app.listeningOrigin + '/health')).json(), { status: 'healthy', nodes: { healthy: 1, resting: 0, total: 1 } })
})

t.test('case 03: three tries of a bad request stop nobody else', async t => {
  const node = await modelServer(t, (_request, response, { user }) => {
    if (user === 'bad') json(response, 500, { error: { message: 'cannot process this picture' } })
    else json(response, 200, COMPLETION)
  })
  const { post } = await gatewayFor(t, [node])
  for (let i = 0; i < 6; i++) t.match(await post(ask({ user: 'bad' })), { status: 500, body: { error: { message: 'cannot process this picture' } } })
  t.equal((await post(ask())).status, 200)
})

t.test('case 04: a route that a server lacks is its 501, and chat goes on', async t => {
  const node = await modelServer(t, (request, response) => {
    if (request.url === '/v1/embeddings') json(response, 501, { error: { message: 'embeddings are not enabled' } })
    else json(response, 200, COMPLETION)
  })
  const { post } = await gatewayFor(t, [node])
  for (let i = 0; i < 6; i++) t.match(await post({ model: 'm', input: 'x' }, '/v1/embeddings'), { status: 501, body: { error: { message: 'embeddings are not enabled' } } })
  t.equal((await post(ask())).status, 200)
})

t.test('case 07: a rate limit and a quota reach the client when no other node takes the request', async t => {
  const limits = [{ message: 'Rate limit reached', type: 'tokens', code: 'rate_limit_exceeded' }, { message: 'No quota left', type: 'insufficient_quota', code: 'insufficient_quota' }]
  const full = await modelServer(t, (_request, response, { user }) => { json(response, 429, { error: limits[Number(user)] }, { 'retry-after': '7', 'x-ratelimit-reset-requests': '7s' }) })
  const alone = await gatewayFor(t, [full])
  for (const user of [0, 1]) {
    const { status, headers, body } = await alone.post(ask({ user }))
    t.match([status, headers.get('retry-after'), headers.get('x-ratelimit-reset-requests')], [429, '7', '7s'])
    t.same(body, { error: limits[user] }, 'byte for byte')
  }
  const other = await modelServer(t, well)
  const both = await gatewayFor(t, [full, other])
  for (let i = 0; i < 4; i++) t.equal((await both.post(ask({ user: 0 }))).status, 200)
  other.kill()
  t.match((await both.post(ask({ user: 1 }))), { status: 429, body: { error: limits[1] } }, 'what one node has said counts more than that another is gone')
})

t.test('flat errors become OpenAI\'s shape with their message and status', async t => {
  const spellings: Array<[string, string, object]> = [
    ['{"message":"too long","type":"invalid_request_error","code":400,"param":null,"object":"error"}', 'application/json', { message: 'too long', type: 'invalid_request_error', code: 400, param: null }],
    ['{"object":"error","message":"bad","type":"BadRequestError","param":"n","code":400}', 'application/json', { message: 'bad', type: 'BadRequestError', code: 400, param: 'n' }],
    ['{"detail":"nope"}', 'application/json', { message: 'nope', type: 'invalid_request_error', code: null }],
    ['{"detail":[{"loc":["body","max_tokens"],"msg":"Input should be a valid integer","type":"int_parsing"}]}', 'application/json', { message: 'max_tokens: Input should be a valid integer', param: 'max_tokens' }],
    ['{"error":"boom"}', 'application/json', { message: 'boom', type: 'invalid_request_error' }],
    ['{"status":"error","message":"missing or invalid req_id","req_id":null}', 'application/json', { message: 'missing or invalid req_id', type: 'invalid_request_error' }],
    ['Bad picture', 'text/plain; charset=utf-8', { message: 'Bad picture' }],
    ['<h1>Bad request</h1>', 'text/html', { message: 'the model server answered 422' }],
    ['', 'application/json', { message: 'the model server answered 422' }]
  ]
  let next = 0
  const node = await modelServer(t, (_request, response) => { response.writeHead(422, { 'content-type': spellings[next]![1] }).end(spellings[next]![0]) })
  const { post } = await gatewayFor(t, [node])
  for (const [text, , error] of spellings) {
    const { status, body, headers } = await post(ask())
    t.match({ status, body, type: headers.get('content-type') }, { status: 422, body: { error }, type: /^application\/json/ }, text)
    next++
  }
})

t.test('breakers: the last node is asked whatever its breaker says, and less than half of a pool means all of it', async t => {
  const nodes = await Promise.all(Array.from({ length: 2 }, async () => await modelServer(t, (request, response, body, server) => {
    if (ill.has(server)) response.writeHead(200, { 'content-type': 'text/html' }).end('<p>')
    else well(request, response, body, server)
  })))
  const ill = new Set(nodes)
  const { post, app } = await gatewayFor(t, nodes)
  const breakers = (): string[] => Object.values(app.epd.gateway.registry.status()).map(({ breakers }) => breakers.decode)
  for (let i = 0; i < 12; i++) {
    const { status, body, headers } = await post(ask())
    t.match([status, body.error.code], [503, 'upstream_failed'])
    if (breakers().every(state => state === 'open')) t.ok(Number(headers.get('retry-after')) > 1, 'Retry-After is the time that breakers rest')
  }
  t.same(breakers(), ['open', 'open'])
  t.match(await (await fetch(app.listeningOrigin + '/health')).json(), { status: 'healthy', nodes: { healthy: 2, resting: 2, total: 2 } })
  ill.clear()
  for (let i = 0; i < 6; i++) t.equal((await post(ask())).status, 200, 'all are asked')
  t.ok(breakers().includes('closed'), 'what is sent although a breaker is open closes it when it goes well')
})

t.test('case 08: kept connections that the server closes are no failure', async t => {
  for (const end of ['destroy', 'resetAndDestroy'] as const) {
    const models = JSON.stringify({ object: 'list', data: [{ id: 'm' }] })
    const server = createServer(socket => {
      let posts = 0
      let text = ''
      socket.on('error', () => {}).on('data', data => {
        text += String(data)
        const head = text.indexOf('\r\n\r\n')
        if (head < 0 || text.length - head - 4 < Number(/content-length: (\d+)/i.exec(text)?.[1] ?? 0)) return
        const isPost = text.startsWith('POST')
        const body = isPost ? JSON.stringify(COMPLETION) : models
        text = ''
        if (isPost && ++posts === 2) { socket[end](); return }
        setTimeout(() => { socket.write(`HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: ${body.length}\r\n\r\n${body}`) }, isPost ? 20 : 0)
      })
    }).listen(0, '127.0.0.1')
    await once(server, 'listening')
    t.teardown(() => { server.close() })
    const url = `http://127.0.0.1:${(server.address() as AddressInfo).port}`
    const { post, app } = await gatewayFor(t, [{ url, asked: 0, up: true, kill: () => {} }])
    for (let burst = 0; burst < 3; burst++) {
      const replies = await Promise.all(Array.from({ length: 8 }, async () => await post(ask())))
      t.same(replies.map(({ status }) => status), Array(8).fill(200), `${end}, burst ${burst}`)
    }
    t.equal(app.epd.gateway.stats.retries, 0)
    t.equal(app.epd.gateway.registry.status()[url]?.breakers.decode, 'closed')
  }
})

t.test('a request under which a node dies goes to no second one; those that were with it do', async t => {
  const nodes = await Promise.all(Array.from({ length: 3 }, async () => await modelServer(t, (request, response, body, server) => {
    if (body.user === 'poison') server.kill()
    else well(request, response, body, server)
  })))
  const { post } = await gatewayFor(t, nodes)
  for (const stream of [false, true]) {
    const { status, body, headers } = await post(ask({ user: 'poison', stream }))
    t.match([status, body.error.code, headers.get('x-should-retry'), headers.get('retry-after')], [502, 'node_died', 'false', null])
    t.equal(nodes.filter(({ up }) => up).length, stream ? 1 : 2, 'one node for one request')
  }
  t.equal((await post(ask())).status, 200)
})

t.test('of the requests under a node that dies, the last one is taken for the cause, and the others move', async t => {
  const hold: Script = (request, response, body, server) => { if (body.user !== 'held') well(request, response, body, server) }
  const a = await modelServer(t, hold)
  const b = await modelServer(t, well)
  const { post, app } = await gatewayFor(t, [a])
  const first = [1, 2].map(async () => await post(ask({ user: 'held' })))
  await until(() => a.asked === 2, 'both are with the node')
  const { registry } = app.epd.gateway
  const started = performance.now()
  await until(() => performance.now() - started > 60, 'the last one comes later than at the same time')
  const last = post(ask({ user: 'held' }))
  await until(() => a.asked === 3, 'the last one is with the node')
  registry.add({ url: b.url, adapter: 'openai' })
  await registry.waitFor(({ byId }) => byId.get(b.url)?.state === 'healthy')
  a.kill()
  t.same((await Promise.all(first)).map(({ status }) => status), [200, 200])
  t.match(await last, { status: 502, body: { error: { code: 'node_died' } } })
  t.equal(b.asked, 2)
})

t.test('vLLM\'s engine that dies says so, and the request goes to no second one', async t => {
  const dying = (): object => ({ error: { message: 'EngineCore encountered an issue. See stack trace (above) for the root cause.', type: 'InternalServerError', code: 500 } })
  const nodes = await Promise.all([1, 2].map(async () => await modelServer(t, (_request, response) => { json(response, 500, dying()) })))
  const { post } = await gatewayFor(t, nodes)
  t.match(await post(ask()), { status: 502, body: { error: { code: 'node_died' } } })
  t.equal(nodes[0]!.asked + nodes[1]!.asked, 1)
})

t.test('a connection that is cut by a node that lives moves the request', async t => {
  const cutting = await modelServer(t, request => { request.socket.resetAndDestroy() })
  const other = await modelServer(t, well)
  const { post } = await gatewayFor(t, [cutting, other])
  for (let i = 0; i < 3; i++) t.equal((await post(ask())).status, 200)
  t.ok(cutting.asked > 0)
})

t.test('a node that breaks off every stream after its first event opens its breaker', async t => {
  const node = await modelServer(t, (_request, response) => { response.writeHead(200, { 'content-type': 'text/event-stream' }).write(CHUNK, () => { response.destroy() }) })
  const { post, app } = await gatewayFor(t, [node])
  const breaker = (): string => app.epd.gateway.registry.status()[node.url]!.breakers.decode
  for (let i = 0; i < 5; i++) {
    t.equal(breaker(), 'closed')
    t.match((await post(ask({ stream: true }))).text, /upstream_broken/)
  }
  t.equal(breaker(), 'open')
})

t.test('a node that breaks off while it waits for a slow client is not to blame, on any route', async t => {
  let answering!: ServerResponse
  const node = await modelServer(t, (_request, response, { stream }) => {
    answering = response.writeHead(200, { 'content-type': stream === true ? 'text/event-stream' : 'audio/mpeg' })
    answering.write(CHUNK.repeat(1_000))
  })
  const { app, url } = await buildGateway(t, {
    options: { nodes: [{ url: node.url, adapter: 'openai' }] },
    // The client reads nothing before the node has broken off.
    before: app => {
      app.addHook('onSend', async (_request, _reply, payload) => {
        if (!(payload instanceof AnswerStream)) return payload
        await until(() => payload.readableLength > 64 * 1024, 'the node has to wait')
        answering.destroy()
        return payload
      })
    }
  })
  await app.epd.nodes.waitFor(({ models }) => models.length > 0)
  for (let i = 0; i < 5; i++) {
    t.equal(app.epd.nodes.status()[node.url]!.breakers.decode, 'closed')
    t.match(await (await post(url + '/v1/chat/completions', ask({ stream: true }))).text(), /upstream_broken/)
    await t.rejects(post(url + '/v1/audio/speech', { input: 'x' }).then(async response => await response.text()))
  }
})
