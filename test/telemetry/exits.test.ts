/** Whatever way a request takes out of the gateway, all of its spans end, with the request and in one tree. */
import { request as httpRequest } from 'node:http'
import { context, propagation, SpanStatusCode, trace } from '@opentelemetry/api'
import { NodeTracerProvider, type ReadableSpan, type Span } from '@opentelemetry/sdk-trace-node'
import t from 'tap'
import type { EpdOptions } from '../../plugin/index.ts'
import { buildGateway, chat, pictureUrl, post, settled, type FakeGateway } from '../helper/fake-gateway.ts'
import { fakeAdapter, FakeNode } from '../helper/fake-node.ts'
import { instrumentUndici } from '../helper/instrument-undici.ts'
import { until } from '../helper/until.ts'

const PATH = '/v1/chat/completions'
const open = new Set<Span>()
const ended: ReadableSpan[] = []
const provider = new NodeTracerProvider({
  spanProcessors: [{
    onStart (span) { open.add(span) },
    onEnd (span) {
      open.delete(span as Span)
      ended.push(span)
    },
    async forceFlush () {},
    async shutdown () {}
  }]
})
provider.register()
t.teardown(async () => {
  await provider.shutdown()
  trace.disable()
  context.disable()
  propagation.disable()
})

const encoders = await Promise.all([0, 1].map(() => FakeNode.start(t, { role: 'encoder' })))
const pds = await Promise.all([0, 1].map(() => FakeNode.start(t)))
const nodes = [...encoders, ...pds]
/** An encoder whose adapter never settles and ignores its signal. */
const deaf = { ...fakeAdapter, name: 'deaf', encode: () => new Promise<never>(() => {}) }
const options: EpdOptions = { bypass: 'never', admission: { visionTokens: 1, queue: 1, wait: 5_000 }, timeouts: { encode: 1_000, firstByte: 1_000, answer: 1_000, idle: 1_000 } }

/** All spans that were made in the meantime, once the gateway is at rest. */
async function spansOf ({ app, url }: FakeGateway, run: (url: string) => Promise<unknown>): Promise<ReadableSpan[]> {
  ended.length = 0
  await run(url)
  await until(() => app.epd.gateway.inFlight === 0, 'the request is over')
  await until(() => open.size === 0, 'all spans have ended').catch((err: Error) => { throw new Error(`${[...open].map(span => span.name).join(', ')}: ${err.message}`) })
  return [...ended]
}

function leave (body: object, ready: () => unknown): (url: string) => Promise<void> {
  return async url => {
    const { hostname, port } = new URL(url)
    const request = httpRequest({ hostname, port, path: PATH, method: 'POST', headers: { 'content-type': 'application/json' } })
    request.on('error', () => {}).on('response', response => { response.on('error', () => {}).resume() })
    request.end(JSON.stringify(body))
    await until(ready, 'the request is where it should be')
    request.destroy()
  }
}

/** A client without instrumentation; fetch would be instrumented. */
async function bare (url: string, headers: Record<string, string>, body?: object): Promise<void> {
  await new Promise<void>((resolve, reject) => {
    httpRequest(url, { method: body === undefined ? 'GET' : 'POST', headers: { ...headers, 'content-type': 'application/json' } }, response => { response.resume().on('end', resolve) })
      .on('error', reject).end(body === undefined ? undefined : JSON.stringify(body))
  })
}

const text = chat('?')
const picture = (seed: string): object => chat('?', pictureUrl(seed), pictureUrl(seed + ' too'))
const ask = (body: object) => async (url: string): Promise<void> => { await (await post(url + PATH, body)).arrayBuffer() }
const all = (list: FakeNode[], kind: 'encodeFaults' | 'generateFaults', ...faults: FakeNode['encodeFaults']) => (): void => { for (const node of list) node[kind].push(...faults) }
const encoding = (): boolean => encoders.some(node => node.calls('/encode').length > 0)
const generating = (): boolean => pds.some(node => node.generations.length > 0)

interface Exit { readonly before?: () => void, readonly run: (url: string) => Promise<unknown>, readonly root: 'ok' | 'error' | 'aborted' }
const exits: Record<string, Exit> = {
  'an answer': { run: ask(text), root: 'ok' },
  'an answer about pictures, streamed': { run: ask({ ...picture('a'), stream: true }), root: 'ok' },
  'an encoder that fails': { before: () => { encoders[0]!.encodeFaults.push('failed') }, run: ask(picture('b')), root: 'ok' },
  'encoders that all reset': { before: all(encoders, 'encodeFaults', 'reset', 'reset'), run: ask(picture('c')), root: 'error' },
  'encoders that hang': { before: all(encoders, 'encodeFaults', 'silence'), run: ask(picture('d')), root: 'error' },
  'a bad picture': { before: all(encoders, 'encodeFaults', 'rejected'), run: ask(picture('e')), root: 'error' },
  'features that are lost, twice': { before: all(pds, 'generateFaults', 'gone', 'gone'), run: ask(picture('f')), root: 'error' },
  'a language model that resets before its first event': { before: () => { pds[0]!.generateFaults.push('reset', 'reset') }, run: ask(text), root: 'ok' },
  'language models that hang': { before: all(pds, 'generateFaults', 'silence'), run: ask(text), root: 'error' },
  'a stream that breaks off': { before: all(pds, 'generateFaults', 'half'), run: ask({ ...text, stream: true }), root: 'error' },
  'a stream that falls silent': { before: all(pds, 'generateFaults', 'pause'), run: ask({ ...text, stream: true }), root: 'error' },
  'a 4xx of the language model': { before: all(pds, 'generateFaults', 'rejected'), run: ask(text), root: 'error' },
  'a model that no node serves': { run: ask({ ...text, model: 'unknown' }), root: 'error' },
  'a client that leaves in encode': { before: all(encoders, 'encodeFaults', 'silence'), run: leave(picture('g'), encoding), root: 'aborted' },
  'a client that leaves before the first event': { before: all(pds, 'generateFaults', 'silence'), run: leave(text, generating), root: 'aborted' },
  'a client that leaves in the middle of a stream': { before: all(pds, 'generateFaults', 'pause'), run: leave({ ...text, stream: true }, generating), root: 'aborted' }
}

for (const [name, { before, run, root }] of Object.entries(exits)) {
  t.test(`all spans end: ${name}`, async t => {
    for (const node of nodes) {
      node.seen.length = 0
      node.encodeFaults.length = 0
      node.generateFaults.length = 0
    }
    // Another gateway, because breakers keep their state.
    const gateway = await buildGateway(t, { nodes, options })
    before?.()
    const spans = await spansOf(gateway, run)
    const roots = spans.filter(span => span.parentSpanContext === undefined)
    t.strictSame(roots.map(span => span.name), [roots[0]?.attributes['gen_ai.request.model'] === 'unknown' ? 'chat unknown' : 'chat vlm'])
    t.equal(spans.at(-1), roots[0], 'the request\'s own span is the last to end')
    const ids = new Set(spans.map(span => span.spanContext().spanId))
    t.ok(spans.every(span => span === roots[0] || ids.has(span.parentSpanContext!.spanId)), 'all others hang below it')
    const { status, attributes } = roots[0]!
    t.equal(status.code, root === 'error' ? SpanStatusCode.ERROR : SpanStatusCode.UNSET)
    t.equal(attributes['epd.aborted'], root === 'aborted' ? true : undefined)
    t.equal(attributes['error.type'] === undefined, root !== 'error')
    const byId = new Map(spans.map(span => [span.spanContext().spanId, span.name]))
    for (const node of nodes) {
      for (const call of node.seen.filter(({ path }) => path === '/encode' || path.startsWith('/v1/'))) {
        t.strictSame(call.traceparents.map(traceparent => byId.get(traceparent.slice(36, 52))), [call.path === '/encode' ? 'epd.encode.call' : 'epd.decode'], 'one traceparent, of the stage that makes the call')
      }
    }
  })
}

for (const sampled of [true, false]) {
  t.test(`with undici instrumented too each hop still has one traceparent: a request that is ${sampled ? '' : 'not '}sampled`, async t => {
    instrumentUndici(t)
    const gateway = await buildGateway(t, { nodes, options })
    for (const node of nodes) node.seen.length = 0
    all(encoders, 'encodeFaults', 'silence')()
    const trace = 'd'.repeat(32)
    const headers = { traceparent: `00-${trace}-${'e'.repeat(16)}-0${Number(sampled)}` }
    const spans = await spansOf(gateway, async url => {
      for (const body of [text, { ...text, stream: true }, picture('l')]) await bare(url + PATH, headers, body)
      for (const node of encoders) node.encodeFaults.length = 0
      await bare(url + PATH, headers, picture('m'))
      await bare(`${url}/v1/files`, headers)
      await until(() => encoders.every(node => node.calls('/abort').length > 0), 'encoders that hung get an abort')
    })
    const calls = nodes.flatMap(node => node.seen.filter(call => call.path !== '/link'))
    t.ok(['/encode', PATH, '/abort', '/v1/files'].every(path => calls.some(call => call.path === path)))
    for (const { path, traceparents } of calls) t.match(traceparents, [new RegExp(`^00-${trace}-[0-9a-f]{16}-0${Number(sampled)}$`)], path)
    t.strictSame(calls.filter(call => call.traceparents.length !== 1).map(call => call.path), [])
    const byId = new Map(spans.map(span => [span.spanContext().spanId, span]))
    for (const { path, traceparents } of sampled ? calls : []) {
      const stage = byId.get(traceparents[0]!.slice(36, 52))?.name
      t.equal(stage, path === '/encode' ? 'epd.encode.call' : path === PATH ? 'epd.decode' : path === '/abort' || path === '/release' ? 'chat vlm' : undefined, `${path}: within its stage`)
    }
  })
}

t.test('with undici instrumented too the calls of prefill and decode on two nodes have one traceparent each, of their own stage', async t => {
  instrumentUndici(t)
  const divided = [encoders[0]!, await FakeNode.start(t, { role: 'prefill' }), await FakeNode.start(t, { role: 'decode' })]
  const gateway = await buildGateway(t, { nodes: divided, options })
  for (const node of divided) node.seen.length = 0
  const trace = 'c'.repeat(32)
  const spans = await spansOf(gateway, async url => { await bare(url + PATH, { traceparent: `00-${trace}-${'e'.repeat(16)}-01` }, picture('n')) })
  const byId = new Map(spans.map(span => [span.spanContext().spanId, span]))
  // A probe may have come in between.
  const stages = divided.map(node => node.seen.filter(({ path }) => ['/encode', '/prefill', PATH].includes(path)).map(({ traceparents }) => {
    t.match(traceparents, [new RegExp(`^00-${trace}-[0-9a-f]{16}-01$`)])
    return byId.get(traceparents[0]!.slice(36, 52))?.name
  }))
  t.strictSame(stages, [['epd.encode.call'], ['epd.prefill'], ['epd.decode']])
})

t.test('all spans end: an adapter that never comes back', async t => {
  const gateway = await buildGateway(t, { options: { ...options, adapters: [deaf, fakeAdapter], nodes: [{ ...encoders[0]!.spec, adapter: 'deaf' }, pds[0]!.spec] } })
  await settled(gateway.app.epd.nodes, [encoders[0]!, pds[0]!])
  const spans = await spansOf(gateway, ask(picture('h')))
  t.match(spans.at(-1), { name: 'chat vlm', status: { code: SpanStatusCode.ERROR } })
})

t.test('all spans end: a request that was refused for lack of room', async t => {
  let release!: () => void
  const hold = new Promise<void>(resolve => { release = resolve })
  const gateway = await buildGateway(t, { nodes, options })
  for (const encoder of encoders) encoder.encodeFaults.push({ hold })
  const spans = await spansOf(gateway, async url => {
    const statuses = Promise.all(['i', 'j', 'k'].map(async seed => (await post(url + PATH, picture(seed))).status))
    await until(() => ended.filter(span => span.name === 'chat vlm').length > 0, 'one is turned away')
    release()
    t.ok((await statuses).includes(429))
  })
  t.equal(spans.filter(span => span.status.code === SpanStatusCode.ERROR).length, 1)
})

t.test('all spans end: the gateway closes and does not wait', async t => {
  for (const node of nodes) node.generateFaults.length = 0
  pds.forEach(node => node.generateFaults.push('pause', 'pause'))
  const gateway = await buildGateway(t, { nodes, options: { ...options, timeouts: { grace: 50 } } })
  const spans = await spansOf(gateway, async url => {
    const answer = await post(url + PATH, { ...text, stream: true })
    const read = answer.text().catch(() => '')
    await gateway.app.close()
    await read
  })
  t.match(spans.at(-1), { name: 'chat vlm', status: { code: SpanStatusCode.ERROR } })
})
