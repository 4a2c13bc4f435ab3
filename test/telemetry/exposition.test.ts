/** GET /metrics as scrapers see it: formats, exemplars, tokens, bytes, the process, and how many series there can be. */
import t, { type Test } from 'tap'
import { Counter, Histogram } from '../../adapters/wire/series.ts'
import { expose } from '../../adapters/wire/exposition.ts'
import { buildGateway, chat, pictureUrl, post, settled } from '../helper/fake-gateway.ts'
import { FakeNode } from '../helper/fake-node.ts'
import { metric } from '../helper/metrics.ts'
import { modelServer, telling } from '../helper/model-server.ts'
import { promlint } from '../helper/promlint.ts'

const PATH = '/v1/chat/completions'
const OPEN = 'application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1'

async function scrape (url: string, accept = 'text/plain'): Promise<string> {
  return await (await fetch(`${url}/metrics`, { headers: { accept } })).text()
}

/** A gateway in front of a server that tells its usage, in streams too. */
async function gateway (t: Test): Promise<string> {
  const node = await modelServer(t, telling)
  const { app, url } = await buildGateway(t, { options: { nodes: [{ url: node.url, adapter: 'openai' }] } })
  await app.epd.nodes.waitFor(({ models }) => models.includes('m'))
  return url
}

const TEXT = { model: 'm', messages: [{ role: 'user', content: 'Hello' }] }

t.test('both formats are good, with every kind of sample and without any', async t => {
  const nodes = await Promise.all([FakeNode.start(t, { role: 'encoder' }), FakeNode.start(t)])
  const { url } = await buildGateway(t, { nodes, options: { bypass: 'never' } })
  for (const accept of ['text/plain', OPEN]) t.strictSame(promlint(await scrape(url, accept)), [], `${accept}, fresh`)
  for (const body of [chat('?'), { ...chat('?'), stream: true }, chat('?', pictureUrl(1)), chat('?', pictureUrl(1)), { ...chat('?'), model: 'a "b"\\\n' }]) await (await post(url + PATH, body)).arrayBuffer()
  for (const accept of ['text/plain', OPEN]) t.strictSame(promlint(await scrape(url, accept)), [], `${accept}, used`)
})

t.test('the format is what the scraper asks for, and text for all others', async t => {
  const { url } = await buildGateway(t)
  const formats = {
    [OPEN]: 'open',
    'application/openmetrics-text': 'open',
    'APPLICATION/OPENMETRICS-TEXT; q=0.4, text/plain; q=0.3': 'open',
    'application/openmetrics-text; q=0.3, text/plain; q=0.4': 'plain',
    'application/openmetrics-text; q=0': 'plain',
    'application/openmetrics-text; q=x': 'plain',
    'text/plain': 'plain',
    '*/*': 'plain',
    'application/json': 'plain',
    ',;=,': 'plain'
  }
  for (const [accept, format] of Object.entries(formats)) {
    const answer = await fetch(`${url}/metrics`, { headers: { accept } })
    const text = await answer.text()
    t.equal(answer.headers.get('vary'), 'accept')
    t.equal(answer.headers.get('content-type'), format === 'open' ? 'application/openmetrics-text; version=1.0.0; charset=utf-8' : 'text/plain; version=0.0.4; charset=utf-8', accept)
    t.equal(text.endsWith('# EOF\n'), format === 'open')
  }
})

t.test('an exemplar names the trace of a request that its bucket has counted, in OpenMetrics only', async t => {
  const url = await gateway(t)
  const answer = await post(url + PATH, { ...TEXT, stream: true })
  await answer.text()
  const traceId = answer.headers.get('x-epd-trace-id')!
  const text = await scrape(url, OPEN)
  for (const name of ['gen_ai_server_request_duration_seconds', 'gen_ai_server_time_to_first_token_seconds', 'gen_ai_server_time_per_output_token_seconds']) {
    t.match(text, new RegExp(`^${name}_bucket\\{.*\\} 1 # \\{trace_id="${traceId}"\\} \\S+ \\d+\\.\\d+$`, 'm'), name)
  }
  t.equal((await fetch(`${url}/epd/traces/${traceId}`)).status, 200)
  t.notMatch(await scrape(url), traceId)
})

t.test('a request that is not sampled leaves no exemplar', async t => {
  const url = await gateway(t)
  await (await post(url + PATH, TEXT, { headers: { traceparent: '00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00' } })).text()
  const text = await scrape(url, OPEN)
  t.equal(metric(text, 'gen_ai_server_request_duration_seconds_count'), 1)
  t.notMatch(text, 'trace_id')
})

t.test('tokens are counted by model and type where answers tell them, whole or streamed', async t => {
  const url = await gateway(t)
  for (const body of [TEXT, { ...TEXT, stream: true }, { ...TEXT, model: 'invented' }]) await (await post(url + PATH, body)).text()
  const text = await scrape(url)
  const tokens = (type: string): number | undefined => metric(text, 'gen_ai_client_token_usage_sum', { gen_ai_token_type: type, gen_ai_request_model: 'm' })
  t.equal(tokens('input'), 200)
  t.equal(tokens('output'), 22)
  t.equal(metric(text, 'gen_ai_server_time_to_first_token_seconds_count'), 1, 'of streams only')
  t.equal(metric(text, 'gen_ai_server_time_per_output_token_seconds_count'), 1)
  t.notMatch(text, 'invented')
})

t.test('bytes of requests and answers are counted, and items that need no encoding', async t => {
  const nodes = await Promise.all([FakeNode.start(t, { role: 'encoder' }), FakeNode.start(t)])
  const { url } = await buildGateway(t, { nodes, options: { bypass: 'never' } })
  const body = chat('?', pictureUrl(1))
  const answers = []
  for (let n = 0; n < 2; n++) answers.push(await (await post(url + PATH, body)).text())
  const text = await scrape(url)
  t.equal(metric(text, 'epd_request_bytes_total', { epd_topology: 'e-pd' }), 2 * JSON.stringify(body).length)
  t.equal(metric(text, 'epd_answer_bytes_total', { epd_topology: 'e-pd' }), answers.join('').length)
  t.equal(metric(text, 'epd_encode_skipped_total', { epd_reason: 'cached' }), metric(text, 'epd_gateway_encoder_cache_hits_total'))
})

t.test('a node that is taken out is in no gauge any more', async t => {
  const nodes = await Promise.all([FakeNode.start(t, { role: 'encoder' }), FakeNode.start(t)])
  const { url, app } = await buildGateway(t, { nodes })
  await settled(app.epd.nodes, nodes)
  t.equal(metric(await scrape(url), 'epd_node_up', { epd_node: nodes[0]!.url }), 1)
  app.epd.nodes.remove(nodes[0]!.url)
  t.notMatch(await scrape(url), new RegExp(`^epd_(node|breaker|link)_.*${nodes[0]!.url}`, 'm'))
})

t.test('the process tells of itself', async t => {
  const { url } = await buildGateway(t)
  const text = await scrape(url)
  t.match(text, /^epd_build_info\{component="gateway",version="\d+\.\d+\.\d+",node_version="v\d+\.\d+\.\d+"\} 1$/m)
  for (const name of ['process_start_time_seconds', 'process_cpu_seconds_total', 'process_resident_memory_bytes', 'v8js_memory_heap_used_bytes', 'v8js_memory_heap_limit_bytes', 'nodejs_memory_external_bytes', 'nodejs_eventloop_time_seconds_total']) {
    t.ok(metric(text, name)! > 0, name)
  }
  t.ok(Math.abs(metric(text, 'process_start_time_seconds')! - Date.now() / 1_000) < 3_600)
  if (process.platform === 'linux') t.ok(metric(text, 'process_open_fds')! > 2 && metric(text, 'process_max_fds')! > metric(text, 'process_open_fds')!)
})

t.test('series are bounded: the oldest makes room', async t => {
  const counter = new Counter('node')
  const histogram = new Histogram([1], 'node')
  for (let n = 0; n < 5_000; n++) {
    counter.add(1, `node-${n}`)
    histogram.record(1, [`node-${n}`])
  }
  t.equal(counter.samples().length, 2_000)
  t.equal(histogram.distributions().length, 2_000)
  t.equal(counter.samples().at(-1)!.labels.node, 'node-4999')
})

t.test('any label value and any number makes a good page', async t => {
  const counter = new Counter('a', 'b')
  const histogram = new Histogram([0.5, 1, 10], 'a')
  for (const value of ['', '"', '\\', '\n', '\\n"', 'ä', '\u{1F600}', '} 1', '\t', '\\\\"']) {
    counter.add(1e21, value, undefined)
    for (const number of [0, -1, 1e-9, 1e21, Infinity]) histogram.record(number, [value], '0'.repeat(32))
  }
  counter.add(0.1, undefined, 'x')
  const families = [
    { name: 'some.things', type: 'counter', help: 'With a \\ and a "quote".', read: () => counter.samples() },
    { name: 'some.times', type: 'histogram', unit: 's', help: 'Times.', read: () => histogram.distributions() }
  ] as const
  for (const accept of ['', OPEN]) t.strictSame(promlint(expose(families, accept).text), [], accept)
})
