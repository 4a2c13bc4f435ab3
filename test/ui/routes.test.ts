import { once } from 'node:events'
import { connect, type Socket } from 'node:net'
import { PassThrough, Writable } from 'node:stream'
import t from 'tap'
import { TraceStore } from '../../plugin/index.ts'
import { Thumbnails } from '../../plugin/ui/thumbnails.ts'
import { Broadcast } from '../../plugin/ui/broadcast.ts'
import type { FeedState } from '../../plugin/ui/feed.ts'
import { readGauges } from '../../plugin/ui/gauges.ts'
import { Histograms, RANGES } from '../../plugin/ui/histograms.ts'
import { buildGateway, chat, pictureUrl, post } from '../helper/fake-gateway.ts'
import { mulberry32 } from '../helper/random.ts'
import { FakeNode } from '../helper/fake-node.ts'
import { until } from '../helper/until.ts'
import { samplePictures } from './load.ts'

const PATH = '/v1/chat/completions'

async function firstState (url: string): Promise<FeedState> {
  const stop = new AbortController()
  const answer = await fetch(`${url}/epd/feed`, { signal: stop.signal })
  let text = ''
  for await (const chunk of answer.body!) {
    text += Buffer.from(chunk).toString()
    if (text.includes('\n\n')) break
  }
  stop.abort()
  return JSON.parse(text.slice('data: '.length))
}

t.test('the page is off unless it is asked for', async t => {
  const { url } = await buildGateway(t)
  t.equal((await fetch(`${url}/epd/`)).status, 404)
  t.equal((await fetch(`${url}/epd/feed`)).status, 404)
})

t.test('the page loads nothing but its own files, under a strict policy and any prefix', async t => {
  const { url } = await buildGateway(t, { options: { ui: true, prefix: '/llm' } })
  const redirect = await fetch(`${url}/llm/epd`, { redirect: 'manual' })
  t.equal(redirect.headers.get('location'), '/llm/epd/')
  const page = await fetch(`${url}/llm/epd/`)
  const html = await page.text()
  const policy = page.headers.get('content-security-policy')!
  t.match(policy, /^default-src 'none'; script-src 'self'; style-src 'self'; /)
  t.notMatch(policy, /unsafe|http|\*/)
  t.equal(page.headers.get('x-content-type-options'), 'nosniff')
  t.notMatch(html, /<script>|<style| style=| on[a-z]+=/, 'nothing inline')
  const links = [...html.matchAll(/(?:src|href)="([^"#]+)"/g)].map(found => found[1]!)
  t.ok(links.length >= 4)
  for (const link of links) {
    t.match(link, /^[a-z]+\.(css|js|svg)$/, 'relative to the page')
    const asset = await fetch(`${url}/llm/epd/${link}`)
    t.equal(asset.status, 200, link)
    const text = await asset.text()
    t.notMatch(text.replace('http://www.w3.org/2000/svg', ''), /https?:\/\/(?!\/)[a-z0-9]/i, `${link} names no other origin`)
    t.equal((await fetch(`${url}/llm/epd/${link}`, { headers: { 'if-none-match': asset.headers.get('etag')! } })).status, 304)
  }
  t.equal((await fetch(`${url}/llm/epd/../package.json`)).status, 404)
})

t.test('with an admin key the page asks for it, and without it answers to no foreign name', async t => {
  const locked = await buildGateway(t, { options: { ui: true, adminKey: 'root' } })
  const refused = await fetch(`${locked.url}/epd/`)
  t.equal(refused.status, 401)
  t.match(refused.headers.get('www-authenticate'), /^Basic /)
  const basic = (key: string): { authorization: string } => ({ authorization: `Basic ${Buffer.from(`admin:${key}`).toString('base64')}` })
  t.equal((await fetch(`${locked.url}/epd/`, { headers: basic('toor') })).status, 401)
  t.equal((await fetch(`${locked.url}/epd/`, { headers: basic('root') })).status, 200)
  t.equal((await fetch(`${locked.url}/epd/feed`)).status, 401)
  t.equal((await fetch(`${locked.url}/epd/main.js`, { headers: { authorization: 'Bearer root' } })).status, 200)
  const remote = { remoteAddress: '8.8.8.8' }
  t.equal((await locked.app.inject({ url: '/epd/traces', ...remote, headers: basic('root') })).statusCode, 200, 'what the page reads')
  t.equal((await locked.app.inject({ method: 'POST', url: '/nodes/remove', payload: {}, ...remote, headers: basic('root') })).statusCode, 403, 'a password is for looking only')
  const open = await buildGateway(t, { options: { ui: true } })
  t.equal((await open.app.inject({ url: '/epd/', headers: { host: 'localhost:8000' } })).statusCode, 200)
  t.equal((await open.app.inject({ url: '/epd/', headers: { host: '127.0.0.1:8000' } })).statusCode, 200)
  t.equal((await open.app.inject({ url: '/epd/', headers: { host: 'evil.example:8000' } })).statusCode, 403)
  t.equal((await open.app.inject({ url: '/epd/', ...remote })).statusCode, 403)
})

t.test('the feed has nodes, links, counts and traces, and ends with the gateway', async t => {
  const nodes = await Promise.all([FakeNode.start(t, { role: 'encoder' }), FakeNode.start(t)])
  const store = new TraceStore()
  const { url, app } = await buildGateway(t, { nodes, options: { ui: true, bypass: 'never', telemetry: { store } } })
  await (await post(url + PATH, chat('?', pictureUrl(1)))).arrayBuffer()
  const seconds = Math.floor(Date.now() / 1_000)
  store.add({ traceId: '1'.repeat(32), spanId: '2'.repeat(16), parentSpanId: undefined, name: 'chat vlm', kind: 'client', startTime: [seconds, 0], endTime: [seconds, 5e6], attributes: { 'gen_ai.operation.name': 'chat', 'epd.items': 1 }, status: 'unset', service: 's' })
  const state = await firstState(url)
  t.match(state, {
    health: { status: 'healthy' },
    inFlight: 0,
    requests: [{ plan: 'e-pd', outcome: 'ok', count: 1 }],
    nodes: [{ id: nodes[0]!.url, role: 'encoder', state: 'healthy', encoded: 1, cached: 0, breakers: {} }, { role: 'hybrid' }],
    links: [{ from: nodes[0]!.url, to: nodes[1]!.url, state: 'linked', transport: 'fake', bytes: 0 }],
    traces: [{ name: 'chat vlm', items: 1, partial: false }],
    lately: { request: { failed: 0 } },
    capture: false
  })
  const open = await fetch(`${url}/epd/feed`)
  const ended = open.text()
  await app.close()
  t.match(await ended, /^data: \{/, 'a page does not hold up the gateway\'s end')
})

t.test('a chart has the calls of five minutes and of an hour, in slots, as histograms', t => {
  const now = 1_700_000_000_000
  const histograms = new Histograms()
  const chart = (range: '5m' | '1h', at = now): ReturnType<Histograms['chart']> => histograms.chart(range, at)
  for (let ago = 3_599; ago >= 0; ago--) {
    for (const ms of [10, 20, 40, 1_000]) histograms.note(now - ago * 1_000, ms, false)
    if (ago % 100 === 0) histograms.note(now - ago * 1_000, 5_000, true)
  }
  t.equal(chart('5m').length, 60)
  t.equal(chart('1h').length, 60)
  for (const range of ['5m', '1h'] as const) {
    const { step } = RANGES[range]
    t.ok(chart(range).every(([at], i, all) => at % step === 0 && (i === 0 || at === all[i - 1]![0] + step)), `${range}: one slot after the other`)
    const { calls, failed, p50, p95 } = histograms.sum(range, now)
    t.equal(calls, chart(range).reduce((sum, slot) => sum + slot[1], 0))
    t.ok(failed === (range === '5m' ? 3 : 36) || failed === (range === '5m' ? 2 : 35), `${failed} failed`)
    t.ok(p50! > 18 && p50! < 22 && p95! > 900 && p95! <= 1_100, `${p50}, ${p95}: within a tenth; what failed does not count`)
  }
  t.strictSame([chart('5m', now + 310_000), chart('1h', now + 3_700_000)], [[], []], 'all are too old')
  histograms.note(now + 10_000_000, 1, false)
  t.strictSame(chart('5m', now + 10_000_000).map(slot => slot[1]), [1], 'old slots are used again')
  histograms.note(now, 7, false)
  t.equal(chart('5m', now + 10_000_000).length, 1, 'and what comes too late takes no place')
  t.end()
})

t.test('a chart bears any time and any duration', t => {
  const now = Date.now()
  const histograms = new Histograms()
  for (const ms of [0, -5, NaN, Infinity, 1e12, 1e-9]) for (const at of [now, NaN, -1, 0, Infinity, 1e300]) histograms.note(at, ms, false)
  t.ok(histograms.chart('5m', now).every(slot => slot.slice(1).every(Number.isFinite)))
  const next = mulberry32(7)
  // Quantiles lie between the smallest and the largest, and p50 below p95, whatever came.
  const random = (): number => next() / 2 ** 32
  for (let round = 0; round < 50; round++) {
    const some = new Histograms()
    const values = Array.from({ length: 1 + Math.floor(random() * 40) }, () => 10 ** (random() * 6 - 1))
    for (const value of values) some.note(now, value, false)
    const { p50, p95, calls } = some.sum('1h', now)
    t.equal(calls, values.length)
    t.ok(p50! >= Math.min(...values) / 1.11 && p95! <= Math.max(...values) * 1.11 && p50! <= p95!, `${p50}, ${p95}`)
  }
  t.end()
})

t.test('a node whose clock is ahead takes no other node\'s place in a chart', async t => {
  const store = new TraceStore()
  const { url } = await buildGateway(t, { options: { ui: true, telemetry: { store } } })
  const now = Math.floor(Date.now() / 1_000)
  const call = (n: number, seconds: number): void => { store.add({ traceId: String(n).repeat(32), spanId: '2'.repeat(16), parentSpanId: undefined, name: 'engine.decode', kind: 'internal', startTime: [seconds - 1, 0], endTime: [seconds, 0], attributes: {}, status: 'unset', service: 's' }) }
  call(1, now + 86_400)
  call(2, now - 10)
  const { series } = await (await fetch(`${url}/epd/charts`)).json() as { series: Record<string, { calls: number, p50: number }> }
  t.match(series['decode'], { calls: 2, failed: 0 })
  t.equal((await fetch(`${url}/epd/charts?range=1h`)).status, 200)
  t.equal((await fetch(`${url}/epd/charts?range=2h`)).status, 400)
})

t.test('the page reads queues and caches from what nodes say in their metrics', t => {
  t.strictSame(readGauges('# HELP x\nvllm:num_requests_running{engine="0",model_name="a"} 3.0\nvllm:num_requests_running{engine="1",model_name="a}b"} 1\nvllm:num_requests_waiting{engine="0"} 5\nvllm:kv_cache_usage_perc{engine="0"} 0.25\nvllm:kv_cache_usage_perc{engine="1"} 0.5\n'), { running: 4, waiting: 5, kv: 0.5 })
  t.strictSame(readGauges('sglang:num_queue_reqs{model_name="Qwen/Qwen3"} 4\nsglang:num_running_reqs 8\nsglang:token_usage{x="\\"}"} 0.52'), { waiting: 4, running: 8, kv: 0.52 })
  t.strictSame(readGauges('lmdeploy:num_requests_waiting{a="b"} 0\nlmdeploy:gpu_cache_usage_perc 1.0'), { waiting: 0, kv: 1 })
  t.strictSame(readGauges('epd_sequences{status="waiting"} 2\nepd_sequences{status="prefill"} 1\nepd_sequences{status="running"} 3\nepd_kv_blocks_capacity 100\nepd_kv_blocks_free 50\nepd_kv_blocks_cached 25\nepd_feature_blocks_capacity 10\nepd_feature_blocks_free 4\nepd_feature_blocks_cached 6\n'), { waiting: 2, running: 4, kv: 0.25, features: 0.6 })
  for (const text of ['', 'hello', 'x 1', 'vllm:num_requests_waiting NaN', 'vllm:num_requests_waiting -1', 'vllm:num_requests_waiting +Inf', 'vllm:num_requests_waiting{', 'constructor 1', '{"a":1}', 'vllm:num_requests_waiting{a="' + '\\'.repeat(50_000)]) t.equal(readGauges(text), undefined, text.slice(0, 40))
  // A megabyte of open quotes once took eight seconds.
  for (const text of ['vllm:num_requests_waiting{b="c\n', 'vllm:num_requests_waiting{"', 'vllm:num_requests_waiting ', 'epd_sequences}', '\n', 'a'].map(one => one.repeat(2e6 / one.length))) t.equal(readGauges(text), undefined, text.slice(0, 40))
  t.end()
})

t.test('one node is shown with all that is known of it', async t => {
  const nodes = [await FakeNode.start(t, { role: 'encoder' }), await FakeNode.start(t)]
  const store = new TraceStore()
  const { url, app } = await buildGateway(t, { nodes, options: { ui: true, telemetry: { store } } })
  const [e, pd] = nodes.map(node => node.url) as [string, string]
  const failed = (n: number, node: string, name = 'epd.decode'): void => { store.add({ traceId: String(n).padStart(32, '0'), spanId: '2'.repeat(16), parentSpanId: undefined, name, kind: 'internal', startTime: [n, 0], endTime: [n, 5e6], attributes: { 'epd.node': node, 'error.type': 'X' }, status: 'error', message: `no ${n}`, service: 's' }) }
  for (let n = 1; n <= 50; n++) failed(n, pd)
  for (const name of ['epd.plan', 'epd.encode', 'chat vlm']) failed(60, e, name)
  const get = async (id: string): Promise<unknown> => await (await fetch(`${url}/epd/node?id=${encodeURIComponent(id)}`)).json()
  const { errors, ...rest } = await get(pd) as { errors: Array<{ at: number }> }
  t.match(rest, { state: 'healthy', adapter: 'fake', drained: false, active: 0, work: 0, rate: null, breakers: { encode: 'closed', prefill: 'closed', decode: 'closed' }, links: [{ from: e, to: pd, state: 'linked' }] })
  t.strictSame(errors.map(({ at }) => at), Array.from({ length: 20 }, (_, i) => (50 - i) * 1_000 + 5), 'the last twenty, newest first')
  t.match(errors[0], { traceId: '50'.padStart(32, '0'), span: 'epd.decode', code: 'X', message: 'no 50' })
  app.epd.nodes.drain(pd, true)
  t.match(await get(pd), { state: 'draining', drained: true })
  t.match(await get('http://nowhere'), { error: { code: 'unknown_node' } })
  t.equal((await fetch(`${url}/epd/node`)).status, 400)
  for (let n = 0; n < 3_000; n++) failed(n, `http://unknown:${n}`)
  t.equal((await get(pd) as { errors: unknown[] }).errors.length, 0, 'within a bound of nodes')
})

t.test('the page asks the nodes for that while it is open, and a node that says nothing is left in peace', async t => {
  const nodes = await Promise.all([FakeNode.start(t), FakeNode.start(t, { role: 'encoder' })])
  nodes[0]!.metrics = 'vllm:num_requests_waiting 7\nvllm:kv_cache_usage_perc 0.5\n'
  const { url } = await buildGateway(t, { nodes, options: { ui: true } })
  t.equal((await firstState(url)).nodes[0]!.gauges, null, 'no page was open before')
  const stop = new AbortController()
  t.teardown(() => { stop.abort() })
  const answer = await fetch(`${url}/epd/feed`, { signal: stop.signal })
  let text = ''
  for await (const chunk of answer.body!) {
    text += Buffer.from(chunk).toString()
    if (text.includes('"kv":0.5')) break
  }
  stop.abort()
  const last = JSON.parse(text.trimEnd().split('\n\n').at(-1)!.slice('data: '.length)) as FeedState
  t.strictSame(last.nodes.map(node => node.gauges), [{ waiting: 7, kv: 0.5 }, null])
})

t.test('the feed has prefill and decode nodes, what moves between them, and how long hand-offs take', async t => {
  const nodes = await Promise.all([FakeNode.start(t, { role: 'encoder' }), FakeNode.start(t, { role: 'prefill' }), FakeNode.start(t, { role: 'decode' })])
  const [e, p, d] = nodes.map(node => node.url) as [string, string, string]
  const store = new TraceStore()
  const { url, app } = await buildGateway(t, { nodes, options: { ui: true, bypass: 'never', telemetry: { store } } })
  await (await post(url + PATH, chat('?', pictureUrl(1)))).arrayBuffer()
  const now = Math.floor(Date.now() / 1_000)
  app.epd.gateway.stats.noteSpan({ traceId: '1'.repeat(32), spanId: '3'.repeat(16), parentSpanId: undefined, name: 'engine.migrate', kind: 'internal', startTime: [now, 0], endTime: [now, 5e6], attributes: { 'epd.peer': p, 'epd.peer.bytes': [4_096] }, status: 'unset', service: 's', instance: d })
  store.add({ traceId: '1'.repeat(32), spanId: '2'.repeat(16), parentSpanId: undefined, name: 'epd.prefill', kind: 'internal', startTime: [now, 0], endTime: [now, 5e6], attributes: { 'epd.node': p }, status: 'unset', service: 's' })
  const state = await firstState(url)
  t.match(state, {
    health: { status: 'healthy', models: ['vlm'] },
    requests: [{ plan: 'e-p-d', outcome: 'ok', count: 1 }],
    nodes: [{ role: 'encoder' }, { role: 'prefill' }, { role: 'decode' }],
    links: [{ from: e, to: p, state: 'linked' }, { from: p, to: d, state: 'linked', bytes: 4_096 }]
  })
  t.ok(state.lately['handoff']!.calls >= 1, 'the noted one; that of the request may come later')
})

t.test('pages are bounded in number', async t => {
  const { url } = await buildGateway(t, { options: { ui: true } })
  const stop = new AbortController()
  t.teardown(() => { stop.abort() })
  // Held: an answer that is collected unread closes its connection.
  const pages: Response[] = []
  for (let n = 0; n < 8; n++) pages.push(await fetch(`${url}/epd/feed`, { signal: stop.signal }))
  t.equal((await fetch(`${url}/epd/feed`, { method: 'HEAD' })).status, 404, 'and HEAD takes no place')
  const ninth = await fetch(`${url}/epd/feed`)
  t.equal(ninth.status, 503)
  t.equal(ninth.headers.get('retry-after'), '5')
  await ninth.arrayBuffer()
  t.same(pages.map(({ status }) => status), new Array(8).fill(200))
  stop.abort()
  await until(async () => {
    const again = new AbortController()
    const { status } = await fetch(`${url}/epd/feed`, { signal: again.signal })
    again.abort()
    return status === 200
  }, 'there is room again')
})

t.test('a page that does not read gets fewer messages, then is closed; nothing piles up', async t => {
  let started = 0
  let stopped = 0
  const broadcast = new Broadcast({ maxClients: 2, interval: 2, message: () => 'x'.repeat(100_000), onStart: () => { started++ }, onStop: () => { stopped++ } })
  const stuck = new Writable({ write () {}, highWaterMark: 1 })
  const reader = new PassThrough({ highWaterMark: 1 << 20 })
  let read = 0
  reader.on('data', () => { read++ })
  broadcast.add(stuck as never)
  broadcast.add(reader as never)
  t.ok(broadcast.full)
  await once(stuck, 'close')
  t.ok(stuck.writableLength <= 110_000, `${stuck.writableLength} bytes wait`)
  t.ok(read > 5)
  t.equal(broadcast.size, 1)
  reader.destroy()
  await once(reader, 'close')
  t.strictSame([started, stopped, broadcast.size], [1, 1, 0])
})

t.test('thumbnails are small pictures, bounded in number and bytes', async t => {
  const [png] = await samplePictures()
  const thumbnails = new Thumbnails({ maxPictures: 3, maxBytes: 20_000 })
  t.teardown(() => thumbnails.close())
  const body = (url: string): never => {
    const bytes = Buffer.from(url)
    return { bytes, media: [{ index: 0, modality: 'image', url: { start: 0, end: bytes.length } }] } as never
  }
  for (let n = 0; n < 6; n++) {
    thumbnails.keep(`t${n}`, body(png!))
    t.equal(thumbnails.get(`t${n}`, 0), undefined)
    t.ok(await thumbnails.find(`t${n}`, 0), 'who asks too early waits')
  }
  t.equal(thumbnails.size, 3)
  t.equal(thumbnails.get('t0', 0), undefined, 'the oldest have left')
  t.ok(thumbnails.bytes <= 20_000)
  t.match(thumbnails.get('t5', 0)!.type, /^image\/(webp|png)$/)
  thumbnails.keep('bad', body('data:image/png;base64,bm90IGEgcGljdHVyZQ=='))
  thumbnails.keep('far', body('https://example.com/cat.png'))
  thumbnails.keep('last', body(png!))
  await until(() => thumbnails.get('last', 0), 'it is there')
  t.equal(await thumbnails.find('bad', 0), undefined)
  t.equal(thumbnails.get('far', 0), undefined, 'nothing is fetched')
  for (let n = 0; n < 20; n++) thumbnails.keep(`more ${n}`, body(png!))
  t.equal(await thumbnails.find('more 19', 0), undefined, 'what does not fit the queue is left out')
  thumbnails.keep('at the end', body(png!))
  const late = thumbnails.find('at the end', 0)
  await thumbnails.close()
  t.equal(await late, undefined, 'a picture that never comes is not waited for')
})

t.test('a client that vanishes during the feed leaves nothing behind', async t => {
  const { url, app } = await buildGateway(t, { options: { ui: true } })
  const sockets: Socket[] = []
  for (let n = 0; n < 4; n++) {
    const socket = connect(Number(new URL(url).port), '127.0.0.1')
    sockets.push(socket)
    socket.write('GET /epd/feed HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n')
    await once(socket, 'data')
  }
  for (const socket of sockets) socket.resetAndDestroy()
  await app.close()
  t.pass('the gateway closes')
})
