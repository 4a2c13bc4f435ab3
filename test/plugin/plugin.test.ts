import bearerAuth from '@fastify/bearer-auth'
import cors from '@fastify/cors'
import rateLimit from '@fastify/rate-limit'
import Fastify, { type FastifyInstance } from 'fastify'
import { once } from 'node:events'
import { createRequire } from 'node:module'
import { PassThrough } from 'node:stream'
import { createGunzip, gzipSync } from 'node:zlib'
import { connect, type Socket } from 'node:net'
import t, { type Test } from 'tap'
import epd, { TraceStore, type EpdOptions } from '../../plugin/index.ts'
import { FakeNode, type Fault } from '../helper/fake-node.ts'
import { buildGateway, chat, pictureUrl, post } from '../helper/fake-gateway.ts'
import { until } from '../helper/until.ts'
import { context, propagation, trace } from '@opentelemetry/api'
import { FastifyOtelInstrumentation } from '@fastify/otel'
import { InMemorySpanExporter, NodeTracerProvider, SimpleSpanProcessor } from '@opentelemetry/sdk-trace-node'

const PATH = '/v1/chat/completions'

async function pair (t: Test): Promise<[FakeNode, FakeNode]> {
  return await Promise.all([FakeNode.start(t, { role: 'encoder' }), FakeNode.start(t)])
}

t.test('registering twice is refused', async t => {
  const app = Fastify()
  t.teardown(() => app.close())
  await app.register(epd, { embedded: false })
  await t.rejects(async () => { await app.register(epd, { embedded: false }) }, { code: 'EPD_ERR_ALREADY_REGISTERED' })
})

t.test('wrong options and unknown adapters are refused when registering', async t => {
  const refusal = async (options: unknown): Promise<Error> => {
    const app = Fastify()
    t.teardown(() => app.close())
    return await app.register(epd, options as EpdOptions).then(() => new Error('was taken'), (err: unknown) => err as Error)
  }
  t.match(await refusal({ embeded: false }), { code: 'EPD_ERR_OPTIONS', message: /unknown option embeded/ })
  t.match(await refusal({ nodes: [{ url: 'http://a:1', adapter: 'sglang9' }] }), { code: 'EPD_ERR_OPTIONS', message: /nodes\[0\]\.adapter must be one of "pytorch", "turbomind", "vllm", "sglang", "openai", not "sglang9"/ })
  t.match(await refusal({ nodes: [{ url: 'http://a:1' }, { url: 'http://a:1' }] }), { message: /nodes\[1\]\.url must not be that of nodes\[0\]/ })
  t.match(await refusal({ embedded: false, adapters: [{ name: 'x', specificationVersion: 'v1' }] }), { code: 'EPD_ERR_OPTIONS', message: /adapters\[0\]: adapter x: probe must be a function/ })
  t.match(await refusal({ embedded: false, adapters: [{ name: 'x', specificationVersion: 'v2' }] }), { message: /adapters\[0\]\.specificationVersion must be "v1", not "v2"/ })
})

t.test('own routes honour the prefix of the registration and of the context around', async t => {
  const [encoder, pd] = await pair(t)
  const { url } = await buildGateway(t, { nodes: [encoder, pd], options: { prefix: '/ai/' } })
  t.equal((await post(`${url}/ai${PATH}`, chat('?'))).status, 200)
  t.equal(pd.generations[0]!.path, PATH)
  t.equal((await post(`${url}${PATH}`, chat('?'))).status, 404)
  t.equal((await fetch(`${url}/ai/health`)).status, 200)
  t.equal((await fetch(`${url}/ai/nodes/status`)).status, 200)
  t.equal((await fetch(`${url}/ai/v1/files?x=1`)).status, 200)
  t.equal(pd.generations.at(-1)!.path, '/v1/files?x=1')
})

t.test("own routes go through the application's auth, rate limit and CORS", async t => {
  const [encoder, pd] = await pair(t)
  const { url } = await buildGateway(t, {
    nodes: [encoder, pd],
    before: async app => {
      await app.register(cors, { origin: 'https://shop.example' })
      await app.register(rateLimit, { max: 2, timeWindow: 60_000 })
      await app.register(bearerAuth, { keys: ['secret'] })
    }
  })
  const headers = { authorization: 'Bearer secret', origin: 'https://shop.example' }
  t.equal((await post(`${url}${PATH}`, chat('?'))).status, 401)
  for (const body of [chat('?'), { ...chat('?', pictureUrl(1)), stream: true }]) {
    const answer = await post(`${url}${PATH}`, body, { headers })
    t.equal(answer.status, 200)
    t.equal(answer.headers.get('access-control-allow-origin'), 'https://shop.example')
    t.ok(answer.headers.get('x-ratelimit-remaining'), 'rate limit headers are kept')
    await answer.text()
  }
  t.equal((await post(`${url}${PATH}`, chat('?'), { headers })).status, 429)
  t.equal(pd.generations.length, 2)
})

t.test('onSend hooks run, for streams too, and may replace the payload', async t => {
  const [encoder, pd] = await pair(t)
  const { url } = await buildGateway(t, {
    nodes: [encoder, pd],
    before: app => {
      app.addHook('onSend', async (request, reply, payload) => {
        reply.header('x-seen', 'yes')
        return request.headers['x-replace'] === undefined ? payload : 'replaced'
      })
    }
  })
  const plain = await post(`${url}${PATH}`, chat('?'))
  t.equal(plain.headers.get('x-seen'), 'yes')
  t.equal(plain.headers.get('x-epd-plan'), 'pd')
  t.match(await plain.json(), { object: 'chat.completion' })
  const stream = await post(`${url}${PATH}`, { ...chat('?'), stream: true })
  t.equal(stream.headers.get('x-seen'), 'yes')
  t.equal(stream.headers.get('content-type'), 'text/event-stream')
  t.match(await stream.text(), /hello[^]*\[DONE\]/)
  const broken = post(`${url}${PATH}`, { ...chat('?'), stream: true })
  await broken
  pd.generateFaults.push('half')
  t.match(await (await post(`${url}${PATH}`, { ...chat('?'), stream: true })).text(), /upstream_broken/)
  t.equal(await (await post(`${url}${PATH}`, chat('?'), { headers: { 'x-replace': '1' } })).text(), 'replaced')
  t.equal((await post(`${url}${PATH}`, chat('?'))).status, 200, 'the connection goes on')
})

t.test('config: { epd: true } and attach: media of a known model go through EPD, the rest to the own handler', async t => {
  const [encoder, pd] = await pair(t)
  const own: unknown[] = []
  const routes = (app: FastifyInstance): void => {
    app.post('/marked', { config: { epd: true } }, async request => { own.push(request.body); return { own: true } })
    app.post('/callback', { config: { epd: true } }, (request, reply) => { own.push(request.body); setImmediate(() => reply.send({ own: true })) })
    app.post(PATH, { preHandler: async (request, reply) => { if (request.headers['x-deny'] !== undefined) await reply.code(403).send({ denied: true }) } }, async () => ({ own: true }))
    app.post('/small', { config: { epd: true }, bodyLimit: 2_000 }, async () => ({ own: true }))
  }
  const { url } = await buildGateway(t, { nodes: [encoder, pd], options: { attach: [PATH] }, after: routes })
  for (const path of ['/marked', '/callback', PATH]) {
    t.match(await (await post(url + path, chat('text'))).json(), { own: true }, `${path}: text`)
    t.match(await (await post(url + path, { ...chat('?', pictureUrl(1)), model: 'other' })).json(), { own: true }, `${path}: another model`)
    const answer = await post(url + path, chat('?', pictureUrl(1, 2_000_000)))
    t.equal(answer.headers.get('x-epd-plan'), 'e-pd', `${path}: a large picture`)
    t.match(await answer.json(), { object: 'chat.completion' })
    t.equal(pd.generations.at(-1)!.path, PATH)
  }
  t.match(own[0], chat('text'), 'the own handler gets the parsed body')
  t.equal((await post(`${url}/marked`, undefined, { body: '{"a":' })).status, 400, 'malformed JSON is its own business')
  t.equal((await fetch(`${url}/marked`, { method: 'POST', headers: { 'content-type': 'text/plain' }, body: 'x' })).status, 200)
  t.equal((await post(url + PATH, chat('?', pictureUrl(1)), { headers: { 'x-deny': '1' } })).status, 403, "the route's own hooks come first")
  t.equal((await post(`${url}/small`, chat('?', pictureUrl(1)))).status, 413, "the route's own limit stands")
  t.equal((await fetch(`${url}/health`)).status, 404, 'no health route of ours beside an attached one')
  t.equal((await fetch(`${url}/nodes/status`)).status, 200)
})

t.test('a body that a preParsing hook of the application decodes is read as it comes out', async t => {
  const [encoder, pd] = await pair(t)
  const { url } = await buildGateway(t, {
    nodes: [encoder, pd],
    options: { prefix: '/ai', limits: { body: 20_000 } },
    before: app => {
      app.addHook('preParsing', async (request, _reply, payload) => {
        if (request.headers['content-encoding'] !== 'gzip') return payload.pipe(new PassThrough())
        const plain = Object.assign(payload.pipe(createGunzip()), { receivedEncodedLength: 0 })
        payload.on('data', (chunk: Buffer) => { plain.receivedEncodedLength += chunk.length })
        return plain
      })
    },
    after: app => { app.post('/attached', { config: { epd: true } }, async request => ({ own: request.body })) }
  })
  const send = async (path: string, body: Buffer, headers: Record<string, string>): Promise<Response> =>
    await fetch(url + path, { method: 'POST', body: new Uint8Array(body), headers: { 'content-type': 'application/json', ...headers } })
  const gzip = { 'content-encoding': 'gzip' }
  const [text, picture] = [chat('?'), chat('?', pictureUrl(1))].map(value => Buffer.from(JSON.stringify(value))) as [Buffer, Buffer]
  for (const path of [`/ai${PATH}`, '/attached']) {
    t.equal((await send(path, picture, {})).headers.get('x-epd-plan'), 'e-pd', path)
    t.equal((await send(path, gzipSync(picture), gzip)).headers.get('x-epd-plan'), 'e-pd', path)
    t.equal((await send(path, gzipSync(Buffer.alloc(30_000, 32)), gzip)).status, 413, 'the limit is that of what comes out')
    const broken = await send(path, Buffer.from('no gzip'), gzip)
    t.equal(broken.status, 400)
    t.match(await broken.text(), /could not be decoded/)
  }
  t.match(await (await send('/attached', gzipSync(text), gzip)).json(), { own: chat('?') }, 'its own handler gets what was decoded')
})

t.test('app.epd.handle answers from inside a handler: parsed body, body of its own, overrides', async t => {
  const [encoder, pd] = await pair(t)
  const { url } = await buildGateway(t, {
    nodes: [encoder, pd],
    options: { routes: false, tenant: 'x-customer' },
    after: app => {
      app.post('/parsed', async (request, reply) => await app.epd.handle(request, reply))
      app.post('/own', async (request, reply) => await app.epd.handle(request, reply, { body: chat('own', pictureUrl(1)), overrides: { tenant: 'acme' } }))
      app.post('/alias', async (request, reply) => await app.epd.handle(request, reply, { overrides: { model: 'vlm', set: { max_tokens: 7 }, path: '/v1/completions' } }))
      app.post('/bytes', async (request, reply) => await app.epd.handle(request, reply, { body: Buffer.from(JSON.stringify(chat('b'))) }))
    }
  })
  t.match(await (await post(`${url}/parsed`, chat('hi', pictureUrl(1)), { headers: { 'x-customer': 'c1' } })).json(), { object: 'chat.completion' })
  t.equal(encoder.calls('/encode')[0]!.body.tenant, 'c1')
  const own = await post(`${url}/own`, {})
  t.equal(own.headers.get('x-epd-plan'), 'e-pd')
  t.equal(encoder.calls('/encode')[1]!.body.tenant, 'acme')
  await post(`${url}/alias`, { model: 'nice-name', prompt: 'x' })
  t.match(pd.generations.at(-1), { path: '/v1/completions', body: { model: 'vlm', prompt: 'x', max_tokens: 7 } })
  t.equal((await post(`${url}/bytes`, {})).status, 200)
  t.match(await (await post(`${url}/alias`, [])).json(), { error: { type: 'invalid_request_error' } }, 'errors are answered, in shape')
  t.equal((await post(url + PATH, chat('?'))).status, 404, 'no own routes')
})

t.test('own API keys guard the OpenAI routes only', async t => {
  const [encoder, pd] = await pair(t)
  const { url } = await buildGateway(t, { nodes: [encoder, pd], options: { apiKeys: ['k1', 'k2'] } })
  const refused = await post(url + PATH, chat('?'), { headers: { authorization: 'Bearer nope' } })
  t.equal(refused.status, 401)
  t.same(await refused.json(), { error: { message: 'Incorrect API key provided', type: 'authentication_error', code: 'invalid_api_key', param: null } })
  t.equal((await fetch(`${url}/v1/models`)).status, 401)
  for (const key of ['k1', 'k2']) t.equal((await post(url + PATH, chat('?'), { headers: { authorization: `Bearer ${key}` } })).status, 200)
  t.equal(pd.generations[0]!.headers.authorization, undefined, "the client's key stays here")
  t.equal((await fetch(`${url}/health`)).status, 200)
  t.equal((await fetch(`${url}/nodes/status`)).status, 200)
})

t.test('headers have the plan, and one option turns them off', async t => {
  const [encoder, pd] = await pair(t)
  const on = await buildGateway(t, { nodes: [encoder, pd] })
  const text = await post(on.url + PATH, chat('?'), { headers: { traceparent: '00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01' } })
  t.equal(text.headers.get('x-epd-plan'), 'pd')
  t.equal(text.headers.get('x-epd-reason'), 'text only')
  t.equal(text.headers.get('x-epd-encoders'), null)
  t.equal(text.headers.get('x-epd-trace-id'), '0af7651916cd43dd8448eb211c80319c')
  t.ok(pd.generations[0]!.headers.traceparent)
  t.match(pd.generations[0]!.headers['x-request-id'], /^req-\w+\.[0-9a-f]{8}\w+$/, 'the id is unique among gateways')
  const off = await buildGateway(t, { nodes: [encoder, pd], options: { headers: false } })
  t.equal((await post(off.url + PATH, chat('?'))).headers.get('x-epd-plan'), null)
})

t.test('traces are served from the store given, or not at all', async t => {
  const store = new TraceStore()
  const { url, app } = await buildGateway(t, { options: { telemetry: { store } } })
  t.equal(app.epd.traces, store)
  t.same(await (await fetch(`${url}/epd/traces`)).json(), { traces: [] })
  const off = await buildGateway(t, { options: { telemetry: { traces: false } } })
  t.equal((await fetch(`${off.url}/epd/traces`)).status, 404)
})

/** Sends `count` streamed requests at once over one connection, and waits until the node has begun to answer all. */
async function pipelined (t: Test, url: string, node: FakeNode, count: number): Promise<Socket> {
  node.generateFaults.push(...Array<Fault>(count).fill('pause'))
  const body = JSON.stringify({ ...chat('?'), stream: true })
  const { hostname, port } = new URL(url)
  const socket = connect(Number(port), hostname)
  t.teardown(() => socket.destroy())
  socket.on('error', () => {}).resume()
  socket.write(`POST ${PATH} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: ${body.length}\r\n\r\n${body}`.repeat(count))
  await until(() => node.generations.length === count, 'the node has them all')
  return socket
}

const passing = (app: FastifyInstance): void => { app.addHook('onSend', async (_request, _reply, payload) => payload) }
for (const [how, before] of [['directly', () => {}], ['through onSend hooks', passing]] as const) {
  t.test(`a client that leaves with pipelined requests, answered ${how}, ends them all`, async t => {
    const pd = await FakeNode.start(t)
    const { app, url } = await buildGateway(t, { nodes: [pd], before })
    const socket = await pipelined(t, url, pd, 3)
    socket.destroy()
    await until(() => app.epd.gateway.inFlight === 0, 'no request is in flight')
    await until(() => pd.generations.every(call => call.aborted), 'the node has been left')
    t.equal(app.epd.nodes.snapshot().nodes[0]!.load.requests, 0)
  })
}

t.test('many pipelined requests are few listeners on their connection', async t => {
  const pd = await FakeNode.start(t)
  const { app, url } = await buildGateway(t, { nodes: [pd] })
  const connected = once(app.server, 'connection') as Promise<[Socket]>
  await pipelined(t, url, pd, 20)
  const [socket] = await connected
  t.ok(socket.listenerCount('close') <= socket.getMaxListeners(), `${socket.listenerCount('close')} listeners`)
})

t.test('nothing of the plugin outlives close(), and close() may be called again', async t => {
  const [encoder, pd] = await pair(t)
  const { app } = await buildGateway(t, { nodes: [encoder, pd] })
  await app.close()
  await app.close()
  await until(() => encoder.calls('/encode').length === 0, 'done')
})

t.test('require() gives the plugin itself', async t => {
  const loaded = createRequire(import.meta.url)('../../plugin/index.js') as unknown
  t.equal(loaded, epd)
})

t.test('with @fastify/otel the server span ends, streams included, and is the parent of ours', async t => {
  const exporter = new InMemorySpanExporter()
  const provider = new NodeTracerProvider({ spanProcessors: [new SimpleSpanProcessor(exporter)] })
  provider.register()
  t.teardown(async () => {
    await provider.shutdown()
    trace.disable()
    context.disable()
    propagation.disable()
  })
  const [encoder, pd] = await pair(t)
  const otel = new FastifyOtelInstrumentation()
  const { url } = await buildGateway(t, { nodes: [encoder, pd], options: { bypass: 'never' }, before: async app => { await app.register(otel.plugin()) } })
  for (const stream of [false, true]) {
    exporter.reset()
    const answer = await post(url + PATH, { ...chat('?', pictureUrl(1)), stream })
    t.equal(answer.status, 200)
    await answer.text()
    const spans = await until(() => {
      const ended = exporter.getFinishedSpans()
      return ended.some(span => span.name === 'chat vlm') && ended.some(span => span.name === 'request') ? ended : undefined
    }, 'both spans have ended')
    const traceId = answer.headers.get('x-epd-trace-id')
    t.ok(spans.every(span => span.spanContext().traceId === traceId), 'one trace')
    t.same(spans.map(span => span.name).filter(name => name.startsWith('epd.') && name !== 'epd.receive').sort(), ['epd.decode', 'epd.encode', 'epd.encode.call', 'epd.plan'])
    const ours = spans.find(span => span.name === 'chat vlm')!
    t.ok(spans.some(span => span.spanContext().spanId === ours.parentSpanContext?.spanId), 'our span has a parent in the same process')
    t.ok([...encoder.seen, ...pd.generations].every(call => call.path === '/link' || /^00-[0-9a-f]{32}-[0-9a-f]{16}-01$/.test(String(call.headers.traceparent))), 'one traceparent goes upstream')
  }
})
