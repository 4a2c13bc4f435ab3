import type { AddressInfo } from 'node:net'
import { setFlagsFromString } from 'node:v8'
import { runInNewContext } from 'node:vm'
import { setImmediate } from 'node:timers/promises'
import Fastify, { type FastifyInstance } from 'fastify'
import t, { type Test } from 'tap'
import { follow } from '../../plugin/cli/follow.ts'
import { fetchTrace } from '../../plugin/cli/trace.ts'
import { renderWaterfall } from '../../plugin/cli/waterfall.ts'
import { spanRoutes } from '../../plugin/http/routes/spans.ts'
import { traceRoutes, type TraceRoutesOptions } from '../../plugin/http/routes/traces.ts'
import { parseOtlpTraces } from '../../plugin/traces/otlp.ts'
import type { StoredSpan } from '../../plugin/traces/span.ts'
import { TraceStore } from '../../plugin/traces/store.ts'
import { runCli, runCommand, spawnCli } from '../helper/cli.ts'
import { until } from '../helper/until.ts'

// The bound is about real memory, which only a collected heap shows.
setFlagsFromString('--expose-gc')
globalThis.gc ??= runInNewContext('gc') as NodeJS.GCFunction

/** Bytes in use, on the heap and beside it. What is beside it is freed by another thread. */
const memory = async (): Promise<number> => {
  for (let n = 0; n < 3; n++) {
    globalThis.gc?.()
    await setImmediate()
  }
  const { heapUsed, arrayBuffers } = process.memoryUsage()
  return heapUsed + arrayBuffers
}

const id = (n: number, digits: number): string => n.toString(16).padStart(digits, '0')
const NOW = Math.floor(Date.now() / 1_000) - 60

function span (trace: number, n: number, over: Partial<StoredSpan> = {}): StoredSpan {
  return {
    traceId: id(trace, 32),
    spanId: id(n, 16),
    parentSpanId: undefined,
    name: 'epd.decode',
    kind: 'internal',
    startTime: [NOW, 1_000_000],
    endTime: [NOW, 3_500_000],
    attributes: {},
    status: 'unset',
    service: 'fastify-epd',
    ...over
  }
}

function chat (trace: number, over: Partial<StoredSpan> = {}, attributes: StoredSpan['attributes'] = {}): StoredSpan {
  return span(trace, 1, {
    name: 'chat tiny',
    kind: 'client',
    startTime: [NOW, 0],
    endTime: [NOW, 5_000_000],
    attributes: { 'gen_ai.operation.name': 'chat', 'gen_ai.request.model': 'tiny', 'epd.topology': 'e-pd', 'epd.reason': 'media', ...attributes },
    ...over
  })
}

t.test('spans of several processes join by trace id, in any order, each once', async t => {
  const store = new TraceStore()
  store.add(span(1, 3, { name: 'engine.encode', parentSpanId: id(2, 16), service: 'fastify-epd-engine', instance: 'http://e:1', startTime: [NOW, 2_000_000], endTime: [NOW, 3_000_000] }))
  t.match(store.list(), [{ name: 'engine.encode', model: undefined, spans: 1 }], 'also before the gateway\'s own span is there')
  store.add(span(1, 2, { parentSpanId: id(1, 16) }))
  store.add(chat(1))
  store.add(chat(1))
  const trace = store.get(id(1, 32))!
  t.match(trace, { name: 'chat tiny', model: 'tiny', plan: 'e-pd', reason: 'media', status: 'ok', durationMs: 5 })
  t.strictSame(trace.spans.map(one => [one.name, one.offsetMs, one.durationMs, one.parentSpanId]), [
    ['chat tiny', 0, 5, null], ['epd.decode', 1, 2.5, id(1, 16)], ['engine.encode', 2, 1, id(2, 16)]
  ])
  t.match(trace.spans[2], { start: new Date(NOW * 1_000).toISOString().slice(0, 19) + '.002000Z', instance: 'http://e:1', status: { code: 'unset' } })
  t.equal(store.get(id(9, 32)), undefined)
  store.add(span(2, 1, { startTime: [NOW, 5], endTime: [NOW - 1, 0] }))
  t.equal(store.get(id(2, 32))!.spans[0]!.durationMs, 0, 'a clock that was set back')
})

t.test('the list is newest first and filtered', async t => {
  const store = new TraceStore()
  store.add(chat(1))
  store.add(chat(2, { status: 'error', message: 'no', endTime: [NOW + 2, 0] }, { 'error.type': 'busy' }))
  store.add(chat(3, {}, { 'epd.aborted': true, 'gen_ai.request.model': 'other', 'epd.topology': 'pd' }))
  const ids = (filter: Parameters<TraceStore['list']>[0]): number[] => store.list(filter).map(one => parseInt(one.traceId, 16))
  t.strictSame(ids({}), [3, 2, 1])
  t.strictSame(ids({ limit: 2 }), [3, 2])
  t.strictSame(ids({ model: 'tiny' }), [2, 1])
  t.strictSame(ids({ plan: 'pd' }), [3])
  t.strictSame(ids({ status: 'error' }), [2])
  t.strictSame(ids({ status: 'aborted' }), [3])
  t.strictSame(ids({ minDurationMs: 1_000 }), [2])
})

t.test('the store keeps within its bounds, by number and by bytes', async t => {
  const few = new TraceStore({ maxTraces: 10 })
  for (let n = 1; n <= 100; n++) few.add(chat(n))
  t.equal(few.size, 10)
  t.equal(few.list()[0]!.traceId, id(100, 32))
  const small = new TraceStore({ maxBytes: 100_000 })
  for (let n = 1; n <= 500; n++) small.add(chat(n, {}, { text: 'x'.repeat(500) }))
  t.ok(small.bytes <= 100_000 && small.bytes > 50_000, `${small.bytes} bytes`)
  for (let n = 1; n <= 2_000; n++) small.add(span(9_999, n))
  t.ok(small.bytes <= 100_000, 'also when one trace takes all of it')
  t.ok(small.add(chat(10_000)) && small.get(id(10_000, 32)), 'and the next one has room again')
  for (const maxBytes of [0, 1_000, 2 ** 31, Number.NaN]) t.throws(() => new TraceStore({ maxBytes }), /maxBytes must be 65536 to 1073741824/)
  few.clear()
  t.equal(few.size + few.bytes, 0)
})

t.test('the oldest complete trace leaves first, and traces that never complete keep half of the room at most', async t => {
  const store = new TraceStore({ maxTraces: 10 })
  store.add(span(1, 2, { name: 'epd.plan' }))
  for (let n = 2; n <= 50; n++) store.add(chat(n))
  t.equal(store.size, 10)
  store.add(chat(1))
  t.match(store.get(id(1, 32)), { partial: false, spans: [{ name: 'chat tiny' }, { name: 'epd.plan' }] }, 'what ran for long is whole')
  store.add(chat(51))
  t.notOk(store.has(id(1, 32)), 'and leaves when it has ended, being the oldest')
  for (let n = 100; n < 200; n++) store.add(span(n, 2))
  for (let n = 200; n < 204; n++) store.add(chat(n))
  t.equal(store.size, 10)
  t.ok([200, 201, 202, 203].every(n => store.has(id(n, 32))), 'spans without a request do not push requests out')
})

t.test('a span that is too long is truncated, never dropped', async t => {
  const store = new TraceStore({ maxBytes: 100_000 })
  store.add(chat(1, { message: 'm'.repeat(50_000), status: 'error' }, { 'gen_ai.request.model': 'é'.repeat(50_000) }))
  t.match(store.get(id(1, 32)), { status: 'error', model: 'é'.repeat(1_024), spans: [{ status: { message: 'm'.repeat(1_024) } }] })
  const encoders = Array.from({ length: 1_000 }, (_, n) => `http://${n}`)
  store.add(chat(2, {}, { 'epd.encoders': encoders }))
  t.match(store.list()[0], { name: 'chat tiny', spans: 1, partial: false, encoders: encoders.slice(0, 64) })
})

t.test('ten thousand traces of ten spans stay near what the bound says', async t => {
  const store = new TraceStore({ maxTraces: 20_000, maxBytes: 8 * 1024 * 1024 })
  const before = await memory()
  for (let n = 1; n <= 10_000; n++) for (let k = 1; k <= 10; k++) store.add(span(n, k, { attributes: { 'epd.node': 'http://127.0.0.1:12345', 'epd.tokens': 12 } }))
  t.ok(store.bytes <= 8 * 1024 * 1024)
  t.ok(store.size > 500)
  const held = await memory() - before
  t.ok(held <= 1.1 * 8 * 1024 * 1024, `${(held / 1024 / 1024).toFixed(1)} MiB for a bound of 8`)
})

const exported = (spans: unknown[], resource: unknown = { attributes: [{ key: 'service.name', value: { stringValue: 'svc' } }] }): object => ({ resourceSpans: [{ resource, scopeSpans: [{ scope: {}, spans }] }] })
const raw = (over: object = {}): object => ({
  traceId: id(1, 32), spanId: id(2, 16), parentSpanId: '', name: 'engine.encode', kind: 1, startTimeUnixNano: `${NOW}000000001`, endTimeUnixNano: `${NOW}000000501`, status: {}, ...over
})

t.test('OTLP JSON is read, and what is malformed in it is counted and left out', async t => {
  const { spans: [first], rejected } = parseOtlpTraces(exported([
    raw({
      attributes: [
        { key: 's', value: { stringValue: 'x'.repeat(5_000) } }, { key: 'i', value: { intValue: '42' } }, { key: 'd', value: { doubleValue: 1.5 } }, { key: 'b', value: { boolValue: false } },
        { key: 'a', value: { arrayValue: { values: [{ stringValue: 'p' }, { intValue: 3 }, { kvlistValue: {} }] } } }, { key: 'nested', value: { kvlistValue: { values: [] } } }, { key: '__proto__', value: { stringValue: 'x' } }, null, 7
      ],
      status: { code: 2, message: 'went wrong' }
    }),
    raw({ traceId: 'xyz' }), raw({ spanId: '0'.repeat(16) }), raw({ startTimeUnixNano: 'yesterday' }), raw({ name: '' }), null, 'span'
  ]), 'http://e:1')!
  t.equal(rejected, 6)
  t.match(first, { startTime: [NOW, 1], endTime: [NOW, 501], parentSpanId: undefined, status: 'error', message: 'went wrong', service: 'svc', instance: 'http://e:1', kind: 'internal' })
  const kept = new TraceStore().add(first!)!
  t.strictSame({ ...kept.attributes, s: (kept.attributes.s as string).length }, { s: 1_024, i: 42, d: 1.5, b: false, a: ['p', 3] })
  t.equal(parseOtlpTraces(exported(Array.from({ length: 3_000 }, () => raw())), 'n')!.rejected, 952)
  for (const nonsense of [null, 7, 'x', [], {}, { resourceSpans: {} }]) t.equal(parseOtlpTraces(nonsense, 'n'), undefined)
  t.strictSame(parseOtlpTraces({ resourceSpans: [null, { scopeSpans: 7 }, { scopeSpans: [{ spans: 'x' }] }] }, 'n'), { spans: [], rejected: 0 })
})

t.test('ten thousand traces that engines send stay near the bound, too', async t => {
  const store = new TraceStore({ maxTraces: 20_000, maxBytes: 8 * 1024 * 1024 })
  const attributes = [{ key: 'epd.request.id', value: { stringValue: 'req-1' } }, { key: 'gen_ai.usage.output_tokens', value: { intValue: 12 } }]
  const take = (call: number): void => {
    const body = JSON.stringify(exported(Array.from({ length: 100 }, (_, n) => raw({ traceId: id(call * 100 + n + 1, 32), attributes }))))
    for (const one of parseOtlpTraces(JSON.parse(body), 'http://e:1')!.spans) store.add(one)
  }
  take(0)
  const before = await memory() - store.bytes
  for (let call = 1; call < 100; call++) take(call)
  t.ok(store.bytes <= 8 * 1024 * 1024 && store.size > 5_000, `${store.size} traces in ${store.bytes} bytes`)
  const held = await memory() - before
  t.ok(held <= 1.1 * 8 * 1024 * 1024, `${(held / 1024 / 1024).toFixed(1)} MiB for a bound of 8`)
})

async function serve (t: Test, store: TraceStore | undefined, { guard = async () => {}, off, adminKey }: { guard?: TraceRoutesOptions['guard'], off?: string, adminKey?: string } = {}): Promise<FastifyInstance> {
  const app = Fastify()
  t.teardown(() => app.close())
  const gateway = { options: { allowedNetworks: [], adminKey }, tracing: { store, off }, registry: { isNodeToken: (token: string) => (token === 'good' ? 'http://e:1' : undefined) }, stats: { noteSpan () {} } }
  await app.register(traceRoutes, { gateway, guard })
  await app.register(spanRoutes, { gateway })
  return app
}

t.test('spans of registered nodes come under the name of the node', async t => {
  const store = new TraceStore()
  const app = await serve(t, store)
  const post = async (payload: object | string, authorization?: string): Promise<any> => {
    const answer = await app.inject({ method: 'POST', url: '/epd/otlp/v1/traces', payload, headers: { 'content-type': 'application/json', ...(authorization === undefined ? {} : { authorization }) } })
    return { status: answer.statusCode, body: answer.json() }
  }
  for (const token of ['Bearer bad', 'good']) t.match(await post(exported([raw()]), token), { status: 401, body: { error: { code: 'invalid_api_key' } } })
  t.equal(store.size, 0)
  const claim = { attributes: [{ key: 'service.instance.id', value: { stringValue: 'http://somebody-else' } }] }
  t.strictSame(await post(exported([raw()], claim), 'Bearer good'), { status: 200, body: {} })
  t.equal(store.get(id(1, 32))!.spans[0]!.instance, 'http://e:1')
  t.match(await post(exported([raw({ name: 7 })]), 'Bearer good'), { status: 200, body: { partialSuccess: { rejectedSpans: '1' } } })
  t.match(await post({ spans: [] }, 'Bearer good'), { status: 400, body: { error: { code: 'invalid_request' } } })
  t.match(await post('{', 'Bearer good'), { status: 400 })
  t.match(await post(JSON.stringify({ x: 'x'.repeat(5_000_000) }), 'Bearer good'), { status: 413 })
})

t.test('the reading routes list, filter, show one, and let a guard decide who may', async t => {
  const store = new TraceStore()
  for (let n = 1; n <= 3; n++) store.add(chat(n))
  const app = await serve(t, store)
  const get = async (url: string): Promise<any> => (await app.inject(url)).json()
  t.equal((await get('/epd/traces')).traces.length, 3)
  t.equal((await get('/epd/traces?limit=1&model=tiny&status=ok&plan=e-pd&min_duration_ms=4')).traces.length, 1)
  t.match(await get('/epd/traces?status=weird'), { error: { code: 'invalid_request', message: 'status must be equal to one of the allowed values: ok, error, refused, aborted' } })
  t.match(await get('/epd/traces?limit=0'), { error: { code: 'invalid_request', message: 'limit must be >= 1' } })
  t.match(await get('/epd/traces?min_duration=5'), { error: { code: 'invalid_request', message: /^There is no parameter 'min_duration'; there are model, .*min_duration_ms/ } }, 'a misspelt filter is no filter')
  t.match(await get(`/epd/traces/${id(2, 32)}`), { traceId: id(2, 32), spans: [{ name: 'chat tiny' }] })
  t.match(await get('/epd/traces/nothing'), { error: { code: 'trace_not_found' } })
  const guarded = await serve(t, store, { guard: async (_request, reply) => reply.code(403).send({ error: {} }) })
  t.equal((await guarded.inject('/epd/traces')).statusCode, 403)
  t.equal((await guarded.inject(`/epd/traces/${id(2, 32)}`)).statusCode, 403)
})

t.test('without traces the routes and fastify-epd trace say why', async t => {
  const app = await serve(t, undefined, { off: 'the option telemetry.traces is false' })
  const message = 'This gateway keeps no traces: the option telemetry.traces is false.'
  for (const path of ['/epd/traces', `/epd/traces/${id(1, 32)}`]) {
    const answer = await app.inject(path)
    t.equal(answer.statusCode, 404)
    t.strictSame(answer.json(), { error: { message, type: 'invalid_request_error', code: 'tracing_off', param: null } })
  }
  const url = await app.listen({ host: '127.0.0.1', port: 0 })
  for (const args of [[], [id(1, 32)], ['--follow']]) {
    const told = await runCommand(['trace', ...args, '--url', url])
    t.match(told, { code: 1, stderr: new RegExp(message) }, args.join(' '))
  }
})

function sample (store: TraceStore): void {
  store.add(chat(7, {}, { 'epd.items': 1 }))
  store.add(span(7, 2, { name: 'epd.encode', parentSpanId: id(1, 16), startTime: [NOW, 500_000], endTime: [NOW, 2_500_000], attributes: { 'epd.items': 1 } }))
  store.add(span(7, 3, { name: 'engine.encode', parentSpanId: id(2, 16), startTime: [NOW, 1_000_000], endTime: [NOW, 2_000_000], instance: 'http://127.0.0.1:9', attributes: { 'epd.tokens': 80, 'epd.cached': 0 } }))
  store.add(span(7, 4, { parentSpanId: id(1, 16), startTime: [NOW, 2_500_000], endTime: [NOW, 5_000_000], attributes: { 'epd.node': 'http://pd:1', 'epd.bytes': 81_920 }, status: 'error', message: 'bro\x1b[31mken' }))
}

t.test('a waterfall shows each span\'s place in time, its depth and its facts', async t => {
  const store = new TraceStore()
  sample(store)
  const lines = renderWaterfall(store.get(id(7, 32))!, { width: 110 }).trimEnd().split('\n')
  t.equal(lines.length, 5)
  t.match(lines[0], /^trace 0{31}7 {2}chat tiny {2}ok {2}5\.00 ms$/)
  t.match(lines[1], /^chat tiny +█{20,} +5\.00 ms e-pd {2}\(media\) {2}1 item$/)
  t.match(lines[2], /^ {2}epd\.encode +·+█+·+ +2\.00 ms 1 item$/)
  t.match(lines[3], /^ {4}engine\.encode +·+█+·+ +1\.00 ms @ 127\.0\.0\.1:9 {2}80 tokens$/)
  t.match(lines[4], /^ {2}epd\.decode +·+█+ +2\.50 ms ERROR bro \[31mken {2}pd:1 {2}80\.0 KiB$/)
  const bars = lines.slice(1).map(line => /[·█]+/.exec(line)![0].length)
  t.equal(new Set(bars).size, 1, 'bars are of one length')
  for (const width of [20, 60, 80, 200]) {
    for (const line of renderWaterfall(store.get(id(7, 32))!, { width }).split('\n').slice(1)) t.ok(line.length <= Math.max(width, 60), `${width}: ${line.length}`)
  }
  const evil = new TraceStore()
  evil.add(chat(7, { name: 'chat \x1b]0;title\x07', status: 'error' }))
  // A client may have asked for a model of any name.
  t.match(renderWaterfall(evil.get(id(7, 32))!), /^trace 0{31}7 {2}chat {2}\]0;title {3}error/)
  t.notMatch(renderWaterfall(evil.get(id(7, 32))!), /[\x1b\x07]/) // eslint-disable-line no-control-regex
  t.notMatch(lines.join(''), /\x1b/) // eslint-disable-line no-control-regex
  t.match(renderWaterfall(store.get(id(7, 32))!, { color: true }), /\x1b\[36m/) // eslint-disable-line no-control-regex
})

t.test('fastify-epd trace prints the last or a given trace of a running gateway', async t => {
  const store = new TraceStore()
  const app = await serve(t, store)
  const url = await app.listen({ host: '127.0.0.1', port: 0 })
  const none = await runCommand(['trace', '--url', url])
  t.equal(none.code, 1)
  t.match(none.stderr, /no traces yet/)
  sample(store)
  const last = await runCli(['trace', '--url', url])
  t.equal(last.code, 0)
  t.match(last.stdout, /^trace 0{31}7[^]+engine\.encode/)
  t.match(JSON.parse((await runCommand(['trace', id(7, 32), '--json', '--url', url])).stdout), { traceId: id(7, 32) })
  t.equal((await runCommand(['trace', id(8, 32), '--url', url])).code, 1)
})

t.test('fastify-epd trace takes filters, and follows until it is ended', async t => {
  const store = new TraceStore()
  const app = await serve(t, store)
  const url = await app.listen({ host: '127.0.0.1', port: 0 })
  store.add(chat(1))
  store.add(chat(2, {}, { 'epd.topology': 'pd' }))
  t.match((await runCommand(['trace', '--url', url, '--plan', 'e-pd'])).stdout, /^trace 0{31}1 /)
  t.match(await runCommand(['trace', '--url', url, '--min-duration', '99999']), { code: 1, stderr: /no such traces/ })
  t.match(await runCommand(['trace', '--url', url, '--status', 'fine']), { code: 2 })
  let polls = 0
  const stop = new AbortController()
  const shown: string[] = []
  const following = follow({
    get: async path => {
      const answer = (await app.inject(path)).json()
      polls++
      return answer
    },
    filter: new URLSearchParams({ plan: 'e-pd' }),
    show: trace => { shown.push(trace.traceId) },
    onLost: err => { t.fail(err.message) },
    onFound: () => {},
    signal: stop.signal,
    settledMs: 0
  })
  store.add(span(5, 9, { name: 'epd.plan' }))
  store.add(chat(4, {}, { 'epd.topology': 'pd' }))
  await until(() => polls > 1, 'it knows what was there before')
  store.add(chat(3))
  store.add(chat(6))
  await until(() => shown.length >= 2, 'both are shown')
  stop.abort()
  await following
  t.strictSame(shown, [id(3, 32), id(6, 32)], 'in their order, each once, without those the filter leaves out')
})

t.test('fastify-epd trace --follow waits for a gateway that is started again', async t => {
  const start = async (port: number): Promise<{ store: TraceStore, app: FastifyInstance, port: number }> => {
    const store = new TraceStore()
    const app = await serve(t, store)
    await app.listen({ host: '127.0.0.1', port })
    return { store, app, port: (app.server.address() as AddressInfo).port }
  }
  const first = await start(0)
  const child = spawnCli(t, ['trace', '--follow', '--json', '--url', `http://127.0.0.1:${first.port}`])
  let next = 10
  await until(() => { first.store.add(chat(next++)); return child.stdout().includes('"traceId"') }, 'it follows')
  await first.app.close()
  await until(() => child.stderr().includes("can't reach the gateway"), 'it has noticed')
  const { store } = await start(first.port)
  store.add(chat(5))
  await until(() => child.stdout().includes(id(5, 32)), 'it shows what the new one has')
  await until(() => child.stderr().includes('the gateway is back'), 'and says so')
  t.equal(await child.stop('SIGINT'), 0)
  t.equal(child.stderr().match(/can't reach/g)!.length, 1, 'reported once')
})

t.test('fastify-epd trace ends without noise when its reader has seen enough', async t => {
  const store = new TraceStore()
  const app = await serve(t, store)
  const url = await app.listen({ host: '127.0.0.1', port: 0 })
  store.add(chat(1))
  let next = 10
  for (const args of [['trace', '--url', url], ['trace', '--follow', '--url', url]]) {
    const child = spawnCli(t, args)
    child.process.stdout.destroy()
    const timer = setInterval(() => { store.add(chat(next++)) }, 20)
    t.equal(await child.ended, 0, args.join(' '))
    clearInterval(timer)
    t.equal(child.stderr(), '')
  }
})

t.test('a trace is waited for until it stops growing', async t => {
  const store = new TraceStore()
  const app = await serve(t, store)
  const url = await app.listen({ host: '127.0.0.1', port: 0 })
  const now = Math.floor(Date.now() / 1_000)
  store.add(chat(7, { startTime: [now, 0], endTime: [now + 1, 0] }))
  const reading = fetchTrace({ url }, id(7, 32))
  setTimeout(() => { store.add(span(7, 2, { parentSpanId: id(1, 16), startTime: [now, 0], endTime: [now + 1, 0] })) }, 150)
  t.equal((await reading)!.spans.length, 2)
})
