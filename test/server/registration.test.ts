import { context, trace, ROOT_CONTEXT } from '@opentelemetry/api'
import Fastify, { type FastifyInstance } from 'fastify'
import t, { type Test } from 'tap'
import { startRegistration } from '../../engines/server/registration.ts'
import { startApiServer } from '../../engines/server/index.ts'
import { FakeEngine } from '../helper/fake-engine.ts'
import { until } from '../helper/until.ts'

interface Resource { attributes: Array<{ key: string, value: { stringValue?: string } }> }

/** What OTLP's JSON has of a span, with its resource. */
interface Span { name: string, traceId: string, parentSpanId?: string, resource: Resource }

interface Gateway { url: string, added: unknown[], spans: Span[], tokens: Array<string | undefined>, state: { status: number, token: string }, close: () => Promise<void> }

/** The two routes of a gateway that engines call. */
async function gateway (t: Test, port = 0): Promise<Gateway> {
  const app: FastifyInstance = Fastify({ forceCloseConnections: true })
  const gateway: Gateway = { url: '', added: [], spans: [], tokens: [], state: { status: 200, token: 'token-1' }, close: () => app.close() }
  app.post('/nodes/add', async (request, reply) => {
    gateway.added.push(request.body)
    return reply.code(gateway.state.status).header('x-epd-node-token', gateway.state.token).send('"Added successfully"')
  })
  app.post('/epd/otlp/v1/traces', async (request, reply) => {
    gateway.tokens.push(request.headers.authorization)
    if (request.headers.authorization !== `Bearer ${gateway.state.token}`) return reply.code(401).send({})
    const { resourceSpans } = request.body as { resourceSpans: Array<{ resource: Resource, scopeSpans: Array<{ spans: Array<Omit<Span, 'resource'>> }> }> }
    for (const { resource, scopeSpans } of resourceSpans) for (const scope of scopeSpans) gateway.spans.push(...scope.spans.map(span => ({ ...span, resource })))
    return {}
  })
  gateway.url = await app.listen({ host: '127.0.0.1', port })
  t.teardown(() => app.close())
  return gateway
}

const LOG = { debug () {}, info () {}, warn () {}, error () {} }
const QUICK = { firstPauseMs: 10, longestPauseMs: 40, repeatMs: 30 }

t.test('an engine registers in LMDeploy\'s shape when it is ready, and again and again', async t => {
  const proxy = await gateway(t)
  const server = await startApiServer({ version: '0.0.0', createEngine: async url => new FakeEngine(url, 'encoder'), proxyUrl: proxy.url + '/', registration: QUICK })
  t.teardown(() => server.close())
  await until(() => proxy.added.length >= 3, 'three registrations came')
  t.strictSame(proxy.added[0], { url: server.url, status: { role: 4, models: ['fake-vlm'] } })
  await server.close()
  const before = proxy.added.length
  t.strictSame(proxy.added.at(-1), proxy.added[0])
  t.equal(proxy.added.length, before, 'a closed engine registers no more')
})

t.test('a gateway that comes up late, refuses at first, dies and returns gets its engine each time', async t => {
  const first = await gateway(t)
  const port = Number(new URL(first.url).port)
  await first.close()
  const registration = startRegistration({ proxyUrl: first.url, url: 'http://127.0.0.1:1', role: 1, models: ['m'], log: LOG, ...QUICK })
  t.teardown(() => registration.close())
  const second = await gateway(t, port)
  second.state.status = 500
  await until(() => second.added.length >= 2, 'it is tried again after a refusal')
  t.equal(registration.token(), undefined)
  second.state.status = 200
  await until(() => registration.token() === 'token-1', 'it is registered')
  await second.close()
  const third = await gateway(t, port)
  third.state.token = 'token-2'
  await until(() => registration.token() === 'token-2', 'it registers with the new gateway and takes its token')
})

t.test('an engine\'s spans reach the gateway with the caller\'s trace, and follow the token', async t => {
  const proxy = await gateway(t)
  const server = await startApiServer({ version: '1.2.3', createEngine: async url => new FakeEngine(url, 'encoder'), proxyUrl: proxy.url, registration: { repeatMs: 60_000 } })
  t.teardown(() => server.close())
  await until(() => proxy.added.length === 1, 'it is registered')
  const parent = trace.setSpanContext(ROOT_CONTEXT, { traceId: '0af7651916cd43dd8448eb211c80319c', spanId: 'b7ad6b7169203331', traceFlags: 1, isRemote: true })
  const span = (): void => { trace.getTracer('fastify-epd-engine').startSpan('engine.encode', { attributes: { 'epd.items': 2 } }, parent).end() }
  span()
  await until(() => proxy.spans.length === 1, 'the span came')
  t.match(proxy.spans[0], { traceId: '0af7651916cd43dd8448eb211c80319c', parentSpanId: 'b7ad6b7169203331', name: 'engine.encode' })
  const resource = Object.fromEntries(proxy.spans[0]!.resource.attributes.map(one => [one.key, one.value.stringValue]))
  t.match(resource, { 'service.name': 'fastify-epd-engine', 'service.version': '1.2.3', 'service.instance.id': server.url, 'epd.role': 'encoder' })
  t.equal(context.active(), ROOT_CONTEXT, 'no context is followed through promises in an engine')

  proxy.state.token = 'token-2'
  span()
  await until(() => proxy.added.length === 2, 'a refused token makes it register again')
  span()
  await until(() => proxy.spans.length === 2, 'spans flow again')
  t.equal(proxy.tokens.at(-1), 'Bearer token-2')

  span()
  await server.close()
  t.equal(proxy.spans.length, 3, 'what was waiting is sent at the end')
})

t.test('spans that no gateway accepts fail nothing', async t => {
  const proxy = await gateway(t)
  const server = await startApiServer({ version: '1.2.3', createEngine: async url => new FakeEngine(url, 'encoder'), proxyUrl: proxy.url, registration: { repeatMs: 60_000 } })
  t.teardown(() => server.close())
  await until(() => proxy.added.length === 1, 'it is registered')
  await proxy.close()
  trace.getTracer('fastify-epd-engine').startSpan('engine.encode').end()
  const before = performance.now()
  await server.close()
  t.ok(performance.now() - before < 4_000, 'and delay nothing for long')
})

t.test('a proxy that knows no encoders is asked once, and the log says so', async t => {
  const proxy = await gateway(t)
  proxy.state.status = 422
  const errors: string[] = []
  const registration = startRegistration({ proxyUrl: proxy.url, url: 'http://e', role: 4, models: ['m'], log: { ...LOG, error: (_data, message) => { errors.push(message) } }, ...QUICK })
  await until(() => errors.length > 0, 'it gives up')
  t.match(errors, [/knows no encoders/])
  await registration.close()
  t.equal(proxy.added.length, 1)
  const hybrid = startRegistration({ proxyUrl: proxy.url, url: 'http://pd', role: 1, models: ['m'], log: LOG, ...QUICK })
  await until(() => proxy.added.length > 2, 'other roles are tried again')
  await hybrid.close()
})
