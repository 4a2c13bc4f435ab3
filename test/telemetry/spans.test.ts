import { createServer, type IncomingHttpHeaders } from 'node:http'
import { once } from 'node:events'
import type { AddressInfo } from 'node:net'
import { context, propagation, SpanKind, SpanStatusCode, trace } from '@opentelemetry/api'
import { AsyncLocalStorageContextManager } from '@opentelemetry/context-async-hooks'
import { W3CTraceContextPropagator } from '@opentelemetry/core'
import { InMemorySpanExporter, NodeTracerProvider, SimpleSpanProcessor, type ReadableSpan, type SpanProcessor } from '@opentelemetry/sdk-trace-node'
import Fastify from 'fastify'
import t, { type Test } from 'tap'
import { Agent, request, type Dispatcher } from 'undici'
import { startEngineTelemetry } from '../../engines/server/telemetry.ts'
import { uninstrumented } from '../../plugin/telemetry/propagation.ts'
import { ATTR, ENGINE_TRACER_NAME, SCHEMA_URL, SPAN } from '../../adapters/wire/semconv.ts'
import { spanTime } from '../../adapters/wire/spans.ts'
import { startRequest as start, type RequestTrace, type RequestTraceOptions } from '../../plugin/telemetry/spans.ts'
import { Tracing } from '../../plugin/telemetry/tracing.ts'
import { EpdSpanProcessor, TraceStore } from '../../plugin/traces/store.ts'
import { instrumentUndici } from '../helper/instrument-undici.ts'
import { until } from '../helper/until.ts'

const TRACE_ID = '0af7651916cd43dd8448eb211c80319c'
const PARENT = `00-${TRACE_ID}-b7ad6b7169203331-01`

const startRequest = (options: RequestTraceOptions, tracing = new Tracing()): RequestTrace => start(tracing, options)

/** Tracing of a gateway whose application has no SDK. */
async function started (store: TraceStore | undefined, problems: string[] = []): Promise<Tracing> {
  const tracing = new Tracing(store)
  await tracing.start(message => { problems.push(message) })
  return tracing
}

/** Registers an SDK for one test. */
function sdk (t: Test, spanProcessors: SpanProcessor[] = []): { spans: () => ReadableSpan[], named: (name: string) => ReadableSpan } {
  const exporter = new InMemorySpanExporter()
  const provider = new NodeTracerProvider({ spanProcessors: [new SimpleSpanProcessor(exporter), ...spanProcessors] })
  provider.register({ contextManager: new AsyncLocalStorageContextManager(), propagator: new W3CTraceContextPropagator() })
  t.teardown(async () => {
    await provider.shutdown()
    trace.disable()
    context.disable()
    propagation.disable()
  })
  const spans = (): ReadableSpan[] => exporter.getFinishedSpans()
  return { spans, named: name => spans().find(span => span.name === name)! }
}

interface Received { readonly headers: IncomingHttpHeaders, readonly traceparents: string[] }

/** An upstream that keeps the headers it was sent, raw: two of one name would show. */
async function upstream (t: Test): Promise<Record<'call' | 'foreign', (headers: Record<string, string>) => Promise<Received>>> {
  const seen: Received[] = []
  const server = createServer((req, res) => {
    const traceparents = req.rawHeaders.filter((_value, i) => i % 2 === 1 && req.rawHeaders[i - 1]!.toLowerCase() === 'traceparent')
    seen.push({ headers: req.headers, traceparents })
    res.end()
  })
  server.listen(0, '127.0.0.1')
  await once(server, 'listening')
  const dispatcher = new Agent()
  t.teardown(async () => {
    await dispatcher.destroy()
    server.close()
  })
  const url = `http://127.0.0.1:${(server.address() as AddressInfo).port}`
  const through = (dispatcher: Dispatcher) => async (headers: Record<string, string>) => {
    await (await request(url, { dispatcher, headers })).body.dump()
    return seen.at(-1)!
  }
  return { call: through(uninstrumented(dispatcher)), foreign: through(dispatcher) }
}

t.test('without an SDK the client\'s own trace context passes through and nothing else happens', async t => {
  const chat = startRequest({ headers: { traceparent: PARENT, tracestate: 'vendor=1' }, model: 'm' })
  t.notOk(chat.recording)
  t.equal(chat.traceId, TRACE_ID)
  await chat.stage(SPAN.encode, {}, async encode => {
    t.strictSame(encode.headers, { traceparent: PARENT, tracestate: 'vendor=1' })
    await encode.stage(SPAN.encodeCall, {}, async call => { t.strictSame(call.headers, { traceparent: PARENT, tracestate: 'vendor=1' }) })
  })
  chat.end()
  t.strictSame(startRequest({ headers: {}, model: 'm' }).headers, {})
  t.equal(startRequest({ headers: {}, model: 'm' }).traceId, undefined)
  t.notOk(chat.kept, 'no header promises a trace')
  for (const bad of [`${PARENT}, ${PARENT}`, PARENT.replace('00', 'zz'), PARENT.replace('00', 'ff'), PARENT.replace(TRACE_ID, '0'.repeat(32)), `${PARENT}-more`, `${PARENT}0`, PARENT.toUpperCase(), 'garbage']) {
    t.strictSame(startRequest({ headers: { traceparent: bad, tracestate: 'vendor=1' }, model: 'm' }).headers, {}, bad)
  }
  const later = PARENT.replace('00', '01') + '-more'
  t.strictSame(startRequest({ headers: { traceparent: later }, model: 'm' }).headers, { traceparent: later }, 'a later version may say more')
})

t.test('a request that is not sampled says so to the engines', async t => {
  const { spans } = sdk(t)
  const chat = startRequest({ headers: { traceparent: PARENT.slice(0, -1) + '0' }, model: 'm' })
  t.notOk(chat.recording)
  const stage = chat.begin(SPAN.encode, {})
  for (const { headers } of [stage, stage.begin(SPAN.encodeCall, {})]) t.match(headers.traceparent, new RegExp(`^00-${TRACE_ID}-[0-9a-f]{16}-00$`))
  t.equal(await stage.run(async () => 7), 7)
  stage.set({ x: 1 })
  stage.end({ error: new Error('x') })
  chat.end()
  t.equal(spans().length, 0)
})

t.test('one request is one tree, parented by the client\'s traceparent', async t => {
  const { spans, named } = sdk(t)
  const chat = startRequest({ headers: { traceparent: PARENT, tracestate: 'vendor=1' }, model: 'tiny', attributes: { [ATTR.requestStream]: true } })
  t.equal(chat.traceId, TRACE_ID)
  const plan = chat.begin(SPAN.plan, {})
  plan.set({ [ATTR.reason]: 'media' })
  plan.end()
  await chat.stage(SPAN.encode, { [ATTR.items]: 2 }, async encode => {
    await Promise.all(['a', 'b'].map(node => encode.stage(SPAN.encodeCall, { [ATTR.node]: node }, async call => {
      t.match(call.headers, { traceparent: new RegExp(`^00-${TRACE_ID}-`), tracestate: 'vendor=1' })
    })))
  })
  const decode = chat.begin(SPAN.decode, {})
  decode.run(() => { t.equal(trace.getActiveSpan()?.spanContext().spanId, decode.headers.traceparent!.split('-')[2]) })
  decode.end({ attributes: { [ATTR.outputTokens]: 3 } })
  t.notOk(spans().some(span => span.name === 'chat tiny'), 'the request ends at its last byte')
  chat.end({ attributes: { [ATTR.topology]: 'e-pd' } })
  chat.end({ error: new Error('too late') })
  const root = named('chat tiny')
  t.equal(spans().filter(span => span.name === 'chat tiny').length, 1, 'it ends once')
  t.equal(root.kind, SpanKind.CLIENT)
  t.equal(root.parentSpanContext?.spanId, 'b7ad6b7169203331')
  t.strictSame(root.attributes, {
    'gen_ai.operation.name': 'chat', 'gen_ai.provider.name': 'fastify-epd', 'gen_ai.request.model': 'tiny', 'gen_ai.request.stream': true, 'epd.topology': 'e-pd'
  })
  t.equal(root.status.code, SpanStatusCode.UNSET, 'success is not set, by convention')
  t.equal(root.instrumentationScope.schemaUrl, SCHEMA_URL)
  for (const name of [SPAN.plan, SPAN.encode, SPAN.decode]) t.equal(named(name).parentSpanContext?.spanId, root.spanContext().spanId, name)
  const calls = spans().filter(span => span.name === SPAN.encodeCall)
  t.strictSame(calls.map(call => call.parentSpanContext?.spanId), Array(2).fill(named(SPAN.encode).spanContext().spanId))
  t.equal(named(SPAN.plan).attributes[ATTR.reason], 'media')
})

t.test('spans are stamped to the microsecond, in the order in which things happen', async t => {
  const { spans } = sdk(t)
  const before = Date.now()
  const chat = startRequest({ headers: {}, model: 'm' })
  for (let i = 0; i < 20; i++) chat.begin(SPAN.plan, { i }).end()
  chat.end()
  const micros = ([seconds, nanos]: readonly [number, number]): number => seconds * 1e6 + nanos / 1e3
  const stages = spans().filter(span => span.name === SPAN.plan)
  for (const [i, span] of stages.slice(1).entries()) {
    if (micros(span.startTime) < micros(stages[i]!.endTime)) t.fail('a stage begins before the one ahead of it has ended')
  }
  t.ok(new Set(stages.map(span => micros(span.startTime))).size > 10)
  t.ok(micros(stages[0]!.startTime) >= before * 1e3 && micros(stages.at(-1)!.endTime) <= (Date.now() + 1) * 1e3, 'and it is the wall clock\'s time')
})

t.test('an active span of another instrumentation is the parent, before any header', async t => {
  const { named } = sdk(t)
  trace.getTracer('other').startActiveSpan('POST /v1/chat/completions', server => {
    startRequest({ headers: { traceparent: PARENT }, model: 'm' }).end()
    server.end()
  })
  t.equal(named('chat m').parentSpanContext?.spanId, named('POST /v1/chat/completions').spanContext().spanId)
})

t.test('an error is status and error.type; a client that leaves is neither', async t => {
  const { named } = sdk(t)
  const chat = startRequest({ headers: {}, model: 'm' })
  const failure = Object.assign(new Error('encoder is gone'), { code: 'UNAVAILABLE' })
  await t.rejects(chat.stage(SPAN.encode, {}, async () => { throw failure }), failure)
  chat.begin(SPAN.plan, {}).end({ error: new RangeError('no node') })
  await t.rejects(chat.stage(SPAN.decode, {}, async () => { throw new DOMException('gone', 'AbortError') }))
  chat.end({ aborted: true })
  t.match(named(SPAN.encode), { status: { code: SpanStatusCode.ERROR, message: 'encoder is gone' }, attributes: { 'error.type': 'UNAVAILABLE' } })
  t.equal(named(SPAN.plan).attributes['error.type'], 'RangeError')
  for (const name of ['chat m', SPAN.decode]) t.match(named(name), { status: { code: SpanStatusCode.UNSET }, attributes: { 'epd.aborted': true } }, name)
  t.equal(named(SPAN.decode).attributes['error.type'], undefined)
})

t.test('parents are right with many requests at once', async t => {
  const { spans } = sdk(t)
  await Promise.all(Array.from({ length: 50 }, async (_, n) => {
    const chat = startRequest({ headers: {}, model: `m${n}` })
    await chat.stage(SPAN.encode, { n }, async encode => {
      await new Promise(resolve => setImmediate(resolve))
      await encode.stage(SPAN.encodeCall, { n }, async () => { await new Promise(resolve => setImmediate(resolve)) })
    })
    chat.end()
  }))
  const byId = new Map(spans().map(span => [span.spanContext().spanId, span]))
  const calls = spans().filter(span => span.name === SPAN.encodeCall)
  t.equal(calls.length, 50)
  for (const call of calls) {
    const encode = byId.get(call.parentSpanContext!.spanId)!
    if (encode.attributes.n !== call.attributes.n || byId.get(encode.parentSpanContext!.spanId)!.name !== `chat m${String(call.attributes.n)}`) t.fail('wrong parent')
  }
})

t.test('exactly one traceparent is on the wire, with undici instrumented and without', async t => {
  const { spans, named } = sdk(t)
  const { call, foreign } = await upstream(t)
  const once = async (): Promise<string[]> => {
    const chat = startRequest({ headers: { traceparent: PARENT, tracestate: 'vendor=1' }, model: 'm' })
    const seen = await chat.stage(SPAN.decode, {}, stage => call({ ...stage.headers, 'x-other': '1' }))
    chat.end()
    t.equal(seen.headers['x-other'], '1')
    if (seen.traceparents.length === 1) t.equal(seen.headers.tracestate, 'vendor=1')
    return seen.traceparents
  }
  const plain = await once()
  t.equal(plain.length, 1)
  t.equal(plain[0]!.split('-')[2], named(SPAN.decode).spanContext().spanId)

  instrumentUndici(t)
  const before = spans().filter(span => span.name === 'GET').length
  const traceparents = await once()
  t.strictSame(traceparents, [`00-${TRACE_ID}-${spans().findLast(span => span.name === SPAN.decode)!.spanContext().spanId}-01`])
  t.equal(spans().filter(span => span.name === 'GET').length, before, 'our span of the call is the only one')
  t.equal((await foreign({ traceparent: PARENT })).traceparents.length, 2, 'calls of others are not touched')
})

t.test('without an SDK of the application spans reach the store and an OTLP receiver; so do an engine\'s', async t => {
  const received: any[] = []
  const receiver = Fastify()
  t.teardown(() => receiver.close())
  receiver.post('/v1/traces', async request => {
    received.push({ body: request.body, key: request.headers['x-key'] })
    return {}
  })
  const env = { OTEL_EXPORTER_OTLP_ENDPOINT: await receiver.listen({ host: '127.0.0.1', port: 0 }), OTEL_EXPORTER_OTLP_HEADERS: 'x-key=abc', OTEL_RESOURCE_ATTRIBUTES: 'deployment.environment=test' }
  Object.assign(process.env, env)
  t.teardown(() => { for (const name of Object.keys(env)) delete process.env[name] })
  const store = new TraceStore()
  const tracing = await started(store)
  const chat = startRequest({ headers: {}, model: 'm' }, tracing)
  t.ok(chat.kept)
  chat.begin(SPAN.plan, {}).end()
  chat.end()
  t.match(store.get(chat.traceId!), { status: 'ok', model: 'm', spans: [{ name: 'chat m', kind: 'client', service: 'fastify-epd' }, { name: 'epd.plan' }] })
  await tracing.close()
  await until(() => received.length > 0, 'the receiver has the spans')
  t.equal(received[0].key, 'abc')
  const { resource, scopeSpans } = received[0].body.resourceSpans[0]
  t.match(resource.attributes.find((one: any) => one.key === 'deployment.environment'), { value: { stringValue: 'test' } })
  t.strictSame(scopeSpans[0].spans.map((span: any) => span.name), ['epd.plan', 'chat m'])
  t.equal(trace.getTracer('other').startSpan('other').isRecording(), false, 'the provider is the gateway\'s alone')

  const engine = startEngineTelemetry({ engineId: 'http://e:1', role: 'encoder', version: '0', token: () => undefined, onRefused () {} })!
  t.teardown(() => { propagation.disable() })
  trace.getTracer(ENGINE_TRACER_NAME).startSpan(SPAN.engineEncode).end()
  await engine.close()
  const { resource: sender, scopeSpans: [scope] } = (await until(() => received[1], 'an engine sends there, too')).body.resourceSpans[0]
  const value = (key: string): string => sender.attributes.find((one: any) => one.key === key).value.stringValue
  t.strictSame(['service.name', 'service.instance.id', 'epd.role', 'deployment.environment'].map(value), ['fastify-epd-engine', 'http://e:1', 'encoder', 'test'])
  t.equal(scope.spans[0].name, SPAN.engineEncode)

  const sendOnly = await started(undefined)
  const sent = startRequest({ headers: {}, model: 'without a store' }, sendOnly)
  t.notOk(sent.kept)
  sent.end()
  await sendOnly.close()
  t.equal((await until(() => received[2], 'what no store keeps is sent all the same')).body.resourceSpans[0].scopeSpans[0].spans[0].name, 'chat without a store')
  process.env.OTEL_SDK_DISABLED = 'true'
  t.teardown(() => { delete process.env.OTEL_SDK_DISABLED })
  const disabled = await started(store)
  t.equal(disabled.off, 'the variable OTEL_SDK_DISABLED is true')
  t.equal(startRequest({ headers: {}, model: 'm' }, disabled).recording, false)
})

t.test('what is wrong with an export is logged: variables that ask for what is not there, a receiver that refuses', async t => {
  const receiver = Fastify()
  t.teardown(() => receiver.close())
  let asked = 0
  receiver.post('/v1/traces', async (_request, reply) => {
    asked++
    return reply.code(400).send({})
  })
  const url = await receiver.listen({ host: '127.0.0.1', port: 0 })
  const told = async (env: Record<string, string>, run = async (_tracing: Tracing): Promise<void> => {}): Promise<string[]> => {
    Object.assign(process.env, env)
    const problems: string[] = []
    const tracing = await started(new TraceStore(), problems)
    await run(tracing)
    await tracing.close()
    for (const name of Object.keys(env)) delete process.env[name]
    return problems
  }
  t.strictSame(await told({}), [])
  t.strictSame(await told({ OTEL_TRACES_EXPORTER: 'none', OTEL_EXPORTER_OTLP_PROTOCOL: 'grpc' }), [])
  t.match(await told({ OTEL_TRACES_EXPORTER: 'zipkin' }), [/OTEL_TRACES_EXPORTER: 'zipkin' is not supported/])
  t.match(await told({ OTEL_EXPORTER_OTLP_ENDPOINT: url, OTEL_EXPORTER_OTLP_PROTOCOL: 'grpc' }), [/OTEL_EXPORTER_OTLP_PROTOCOL: grpc is not supported/])
  t.match(await told({ OTEL_EXPORTER_OTLP_ENDPOINT: url, OTEL_BSP_SCHEDULE_DELAY: '1' }, async tracing => {
    for (let n = 1; n <= 3; n++) {
      startRequest({ headers: {}, model: 'm' }, tracing).end()
      await until(() => asked === n, 'it was asked')
    }
  }), [/spans could not be sent to the OTLP receiver: /], 'once')

  process.env.OTEL_EXPORTER_OTLP_ENDPOINT = url
  t.teardown(() => { delete process.env.OTEL_EXPORTER_OTLP_ENDPOINT })
  const lost: string[] = []
  const engine = startEngineTelemetry({ engineId: 'http://e:1', role: 'encoder', version: '0', token: () => undefined, onRefused () {}, onProblem: message => { lost.push(message) } })!
  t.teardown(() => { propagation.disable() })
  trace.getTracer(ENGINE_TRACER_NAME).startSpan(SPAN.engineEncode).end()
  await engine.close()
  t.match(lost, [/spans could not be sent to the OTLP receiver: /], 'by an engine, too')
})

t.test('OTEL_TRACES_EXPORTER=otlp alone sends to where receivers listen by default', async t => {
  const receiver = Fastify()
  t.teardown(() => receiver.close())
  let arrived = 0
  receiver.post('/v1/traces', async () => {
    arrived++
    return {}
  })
  try {
    await receiver.listen({ host: 'localhost', port: 4318 })
  } catch (err) {
    t.plan(0, `another process listens there: ${(err as Error).message}`)
    return
  }
  process.env.OTEL_TRACES_EXPORTER = 'otlp'
  t.teardown(() => { delete process.env.OTEL_TRACES_EXPORTER })
  const tracing = await started(new TraceStore())
  startRequest({ headers: {}, model: 'm' }, tracing).end()
  await tracing.close()
  t.equal(arrived, 1)
})

/** Requests of all kinds, as the store shows them; ids, which differ, by the names of the spans that bear them. */
/** Of two calls that begin in the same moment, either may come first in the store. */
const inOrder = ({ name, attributes }: { name: string, attributes: Readonly<Record<string, unknown>> }): string => `${name} ${String(attributes[ATTR.node])}`

async function shown (tracing: Tracing): Promise<object[]> {
  const failure = Object.assign(new Error('encoder is gone'), { code: 'UNAVAILABLE' })
  const headers = [{}, { traceparent: PARENT, tracestate: 'vendor=1' }, { traceparent: PARENT.replace(/1$/, '0') }, { traceparent: PARENT.replace(/^00-0af7/, '00-zzzz') }]
  const outcomes = [{}, { error: failure }, { aborted: true, attributes: { [ATTR.outputTokens]: 3 } }]
  const all: object[] = []
  for (const incoming of headers) {
    for (const outcome of outcomes) {
      const chat = startRequest({ headers: incoming, model: 'tiny', attributes: { [ATTR.requestStream]: true, [ATTR.retries]: undefined }, arrivedAt: performance.now() - 50 }, tracing)
      const plan = chat.begin(SPAN.plan, { [ATTR.attempt]: 1 })
      plan.set({ [ATTR.reason]: 'media' })
      plan.end()
      let sent: Record<string, string> = {}
      await chat.stage(SPAN.encode, { [ATTR.items]: 2 }, async encode => {
        await Promise.all(['a', 'b'].map(node => encode.stage(SPAN.encodeCall, { [ATTR.node]: node }, async call => { sent = call.headers })))
        encode.set({ [ATTR.items]: 3, [ATTR.encoders]: ['a', 'b'] })
        if ('error' in outcome) throw failure
      }).catch(() => {})
      const decode = chat.begin(SPAN.decode, {})
      decode.end(outcome)
      decode.set({ [ATTR.tokens]: 1 })
      decode.end({ error: failure })
      chat.end(outcome)
      const traceId = chat.traceId ?? ''
      const found = tracing.store!.get(traceId)
      const names = new Map(found?.spans.map(({ spanId, name }) => [spanId, name]))
      const parents = sent.traceparent?.split('-')
      all.push({
        recording: chat.recording,
        kept: chat.kept,
        known: chat.traceId === TRACE_ID,
        sent: [names.get(parents?.[2] ?? ''), parents?.[3], sent.tracestate],
        ...found,
        traceId: undefined,
        start: undefined,
        durationMs: undefined,
        firstTokenMs: undefined,
        perTokenMs: undefined,
        tokensPerSecond: undefined,
        spans: found?.spans.map(one => ({ ...one, traceId: one.traceId === chat.traceId, spanId: one.spanId.length, parentSpanId: names.get(one.parentSpanId ?? '') ?? one.parentSpanId, start: '', end: '', offsetMs: 0, durationMs: 0, service: '' })).sort((a, b) => inOrder(a) < inOrder(b) ? -1 : 1)
      })
      tracing.store!.clear()
    }
  }
  await tracing.close()
  return all
}

t.test('the store shows the same without an SDK of the application, with one, and with one that has our processor', async t => {
  const own = await shown(await started(new TraceStore()))
  t.match(own[0], { recording: true, kept: true, status: 'ok', spans: [{ name: 'chat tiny' }, { name: SPAN.decode }, { name: SPAN.encode, attributes: { [ATTR.items]: 3 } }, { name: SPAN.encodeCall }, { name: SPAN.encodeCall, parentSpanId: SPAN.encode }, { name: SPAN.plan }, { name: SPAN.receive }] })
  t.match(own[6], { recording: false, kept: false, spans: undefined }, 'what the caller did not sample')
  await t.test('with an SDK', async t => {
    sdk(t)
    for (const [i, one] of (await shown(new Tracing(new TraceStore()))).entries()) t.strictSame(one, own[i], `request ${i}`)
  })
  await t.test('with our processor in it', async t => {
    const store = new TraceStore()
    sdk(t, [new EpdSpanProcessor(store)])
    for (const [i, one] of (await shown(new Tracing(store))).entries()) t.strictSame(one, own[i], `request ${i}`)
  })
})

t.test('our processor adds the application\'s spans to the traces of requests, and no other', async t => {
  const store = new TraceStore()
  sdk(t, [new EpdSpanProcessor(store)])
  const tracer = trace.getTracer('other')
  tracer.startSpan('another route').end()
  const traceId = tracer.startActiveSpan('POST /v1/chat/completions', server => {
    const chat = startRequest({ headers: {}, model: 'm' }, new Tracing(store))
    chat.end()
    server.end()
    return chat.traceId!
  })
  t.equal(store.size, 1)
  t.match(store.get(traceId), { name: 'chat m', partial: false, spans: [{ name: 'POST /v1/chat/completions' }, { name: 'chat m' }] })
})

t.test('a request that is under way shows what has ended', async t => {
  const store = new TraceStore()
  const tracing = await started(store)
  const watched: string[] = []
  const unwatch = store.watch(({ name }) => { watched.push(name) })
  const chat = startRequest({ headers: {}, model: 'm' }, tracing)
  for (let i = 0; i < 300; i++) chat.begin(SPAN.encodeCall, { [ATTR.items]: i }).end()
  t.match(store.list(), [{ partial: true, spans: 300 }])
  unwatch()
  chat.end()
  t.match(store.list(), [{ partial: false, spans: 301 }])
  const { spans } = store.get(chat.traceId!)!
  t.strictSame(spans.filter(({ name }) => name === SPAN.encodeCall).map(({ attributes }) => attributes[ATTR.items]), Array.from({ length: 300 }, (_, i) => i), 'in their order')
  t.equal(new Set(spans.map(({ spanId }) => spanId)).size, 301)
  t.equal(watched.length, 300)
})

t.test('times go on after a pause between a look at one clock and at the other', async t => {
  const { now } = Date
  t.teardown(() => { Date.now = now })
  const spin = (ms: number): void => {
    const until = performance.now() + ms
    while (performance.now() < until);
  }
  const pauses = { before: () => { spin(5); return now() }, after: () => { const wall = now(); spin(5); return wall } }
  for (const [when, look] of Object.entries(pauses)) {
    let still = 0
    for (let n = 0; n < 10; n++) {
      Date.now = look
      spanTime()
      Date.now = now
      const first = spanTime()
      spin(0.2)
      if (spanTime() - first < 0.1) still++
    }
    t.equal(still, 0, when)
  }
})
