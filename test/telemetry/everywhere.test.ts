/**
 * The request named in x-epd-trace-id is found in /epd/traces, by `fastify-epd trace` and on the page's feed, whole:
 * without an SDK in the application, with one, and with embedded engines. Without traces nothing names one.
 */
import { context, propagation, trace } from '@opentelemetry/api'
import { AlwaysOffSampler, NodeTracerProvider, type NodeTracerConfig } from '@opentelemetry/sdk-trace-node'
import { FastifyOtelInstrumentation } from '@fastify/otel'
import Fastify from 'fastify'
import t, { type Test } from 'tap'
import epd, { EpdSpanProcessor, TraceStore, type EpdOptions } from '../../plugin/index.ts'
import type { FeedState } from '../../plugin/ui/feed.ts'
import type { TraceView } from '../../plugin/traces/view.ts'
import { runCommand } from '../helper/cli.ts'
import { buildGateway, chat, pictureUrl, post, type BuildOptions, type FakeGateway } from '../helper/fake-gateway.ts'
import { FakeNode } from '../helper/fake-node.ts'
import { drawScene } from '../helper/scenes.ts'
import { until } from '../helper/until.ts'

const PATH = '/v1/chat/completions'
const STAGES = ['epd.plan', 'epd.encode', 'epd.encode.call', 'epd.decode']
const CALLER = '0af7651916cd43dd8448eb211c80319c'
const TRACEPARENT = `00-${CALLER}-b7ad6b7169203331-01`

/** What the application's `node --import ./otel.mjs` would have done. */
function sdk (t: Test, config: NodeTracerConfig = {}): void {
  const provider = new NodeTracerProvider(config)
  provider.register()
  t.teardown(async () => {
    await provider.shutdown()
    trace.disable()
    context.disable()
    propagation.disable()
  })
}

async function gateway (t: Test, options: EpdOptions = {}, build: BuildOptions = {}): Promise<FakeGateway> {
  const nodes = [await FakeNode.start(t, { role: 'encoder' }), await FakeNode.start(t)]
  return await buildGateway(t, { ...build, nodes, options: { ui: true, bypass: 'never', ...options } })
}

/** The first state that the page's feed sends. */
async function feed (url: string): Promise<FeedState> {
  const stop = new AbortController()
  const answer = await fetch(`${url}/epd/feed`, { signal: stop.signal })
  let text = ''
  for await (const chunk of answer.body!.pipeThrough(new TextDecoderStream())) {
    text += chunk
    const message = /^data: (.+)\n\n/m.exec(text)
    if (message === null) continue
    stop.abort()
    return JSON.parse(message[1]!) as FeedState
  }
  throw new Error('the feed ended')
}

/** Looks the trace up in every place, once it has all these spans. */
async function found (t: Test, url: string, traceId: string | null, names: readonly string[]): Promise<TraceView> {
  t.match(traceId, /^[0-9a-f]{32}$/)
  const whole = await until(async () => {
    const answer = await fetch(`${url}/epd/traces/${traceId}`)
    const view = await answer.json() as TraceView
    const there = new Set(view.spans?.map(span => span.name))
    return view.partial === false && names.every(name => there.has(name)) ? view : undefined
  }, `all spans are in the trace: ${names.join(', ')}`)
  const { traces } = await (await fetch(`${url}/epd/traces`)).json() as { traces: Array<{ traceId: string }> }
  t.ok(traces.some(one => one.traceId === traceId), 'it is in the list')
  const printed = await runCommand(['trace', traceId!, '--url', url])
  t.equal(printed.code, 0)
  for (const name of names) t.ok(printed.stdout.includes(name), `fastify-epd trace shows ${name}`)
  t.ok((await feed(url)).traces?.some(one => one.traceId === traceId && !one.partial), 'the page has it')
  return whole
}

for (const [title, before] of [
  ['without an SDK', () => {}],
  ['with an SDK', (t: Test) => { sdk(t) }]
] as const) {
  t.test(`${title} the trace is in every place`, async t => {
    before(t)
    const { url } = await gateway(t)
    for (const stream of [false, true]) {
      const answer = await post(url + PATH, { ...chat('?', pictureUrl(1)), stream }, { headers: { traceparent: TRACEPARENT } })
      await answer.arrayBuffer()
      t.equal(answer.headers.get('x-epd-trace-id'), CALLER)
      await found(t, url, CALLER, ['chat vlm', ...STAGES])
    }
    const refused = await post(url + PATH, { ...chat('?'), model: 'unknown' })
    await found(t, url, refused.headers.get('x-epd-trace-id'), ['chat unknown', 'epd.plan'])
  })
}

for (const passed of [false, true]) {
  t.test(`with an SDK and @fastify/otel the trace is in every place, with our processor ${passed ? '' : 'not '}in the SDK`, async t => {
    const store = new TraceStore()
    sdk(t, passed ? { spanProcessors: [new EpdSpanProcessor(store)] } : {})
    const otel = new FastifyOtelInstrumentation()
    const { url } = await gateway(t, passed ? { telemetry: { store } } : {}, { before: async app => { await app.register(otel.plugin()) } })
    const answer = await post(url + PATH, chat('?', pictureUrl(1)))
    await answer.arrayBuffer()
    const { spans } = await found(t, url, answer.headers.get('x-epd-trace-id'), ['chat vlm', ...STAGES, ...(passed ? ['request'] : [])])
    t.type(spans.find(span => span.name === 'chat vlm')!.parentSpanId, 'string', 'the server span is its parent')
  })
}

t.test('with embedded engines the trace has the spans of the engines', async t => {
  const app = Fastify({ forceCloseConnections: true })
  t.teardown(() => app.close())
  await app.register(epd, { embedded: { encoders: 1, engines: 1 }, ui: true })
  const url = await app.listen({ host: '127.0.0.1', port: 0 })
  await app.epd.embedded!.ready
  const { up, of } = app.epd.embedded!.progress()
  t.ok(up > 0 && up === of, `${up} of ${of} engines are up`)
  const answer = await post(url + PATH, { ...chat('How many shapes are there?', await drawScene(9)), model: 'tiny-internvl', max_tokens: 4 })
  t.equal(answer.status, 200)
  await answer.arrayBuffer()
  const { spans } = await found(t, url, answer.headers.get('x-epd-trace-id'), ['chat tiny-internvl', ...STAGES, 'engine.preprocess', 'engine.encode', 'engine.migrate', 'engine.prefill', 'engine.decode'])
  const byId = new Map(spans.map(span => [span.spanId, span.name]))
  const parentOf = (name: string): string | undefined => byId.get(spans.find(span => span.name === name)?.parentSpanId ?? '')
  t.strictSame(['engine.encode', 'engine.decode'].map(parentOf), ['epd.encode.call', 'epd.decode'], 'they are one tree')
})

t.test('without traces no header names one, and every place says why', async t => {
  const cases: Array<{ why: string, options?: EpdOptions, env?: Record<string, string>, before?: (t: Test) => void }> = [
    { why: 'the option telemetry.traces is false', options: { telemetry: { traces: false } } },
    { why: 'the option telemetry.traces is false', options: { telemetry: { traces: false } }, before: sdk },
    { why: 'the variable OTEL_SDK_DISABLED is true', env: { OTEL_SDK_DISABLED: 'true' } },
    { why: 'the variable OTEL_TRACES_SAMPLER is always_off', env: { OTEL_TRACES_SAMPLER: 'always_off' } }
  ]
  for (const { why, options, env = {}, before } of cases) {
    await t.test(why, async t => {
      Object.assign(process.env, env)
      t.teardown(() => { for (const name of Object.keys(env)) delete process.env[name] })
      before?.(t)
      const { url } = await gateway(t, options)
      for (const headers of [{}, { traceparent: TRACEPARENT }]) {
        const answer = await post(url + PATH, chat('?', pictureUrl(1)), { headers })
        await answer.arrayBuffer()
        t.equal(answer.headers.get('x-epd-plan'), 'e-pd')
        t.notOk(answer.headers.has('x-epd-trace-id'))
      }
      for (const path of ['/epd/traces', `/epd/traces/${CALLER}`]) {
        const answer = await fetch(url + path)
        t.equal(answer.status, 404)
        t.match(await answer.json(), { error: { code: 'tracing_off', message: `This gateway keeps no traces: ${why}.` } })
      }
      t.match(await runCommand(['trace', CALLER, '--url', url]), { code: 1, stderr: new RegExp(why) })
      t.match(await feed(url), { traces: null, tracesOff: why })
    })
  }
})

t.test('a request that is not sampled is not named, and others are', async t => {
  const { url } = await gateway(t)
  const ask = async (flags: string): Promise<string | null> => {
    const answer = await post(url + PATH, chat('?'), { headers: { traceparent: `00-${CALLER}-b7ad6b7169203331-${flags}` } })
    await answer.arrayBuffer()
    return answer.headers.get('x-epd-trace-id')
  }
  t.equal(await ask('00'), null)
  t.match(await (await fetch(`${url}/epd/traces/${CALLER}`)).json(), { error: { code: 'trace_not_found' } })
  await found(t, url, await ask('01'), ['chat vlm', 'epd.plan', 'epd.decode'])
})

t.test('an SDK whose sampler takes nothing names no request', async t => {
  sdk(t, { sampler: new AlwaysOffSampler() })
  const { url } = await gateway(t)
  const answer = await post(url + PATH, chat('?'))
  await answer.arrayBuffer()
  t.notOk(answer.headers.has('x-epd-trace-id'))
  t.strictSame(await (await fetch(`${url}/epd/traces`)).json(), { traces: [] })
})
