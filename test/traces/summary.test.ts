import t from 'tap'
import { summarise, matches, type TraceFilter } from '../../plugin/traces/summary.ts'
import type { StoredSpan } from '../../plugin/traces/span.ts'
import { TraceStore } from '../../plugin/index.ts'
import { buildGateway, chat, pictureUrl, post } from '../helper/fake-gateway.ts'
import { FakeNode } from '../helper/fake-node.ts'
import { until } from '../helper/until.ts'

const ID = '1'.repeat(32)

function span (name: string, n: number, from: number, to: number, attributes: StoredSpan['attributes'] = {}, error?: string): StoredSpan {
  return { traceId: ID, spanId: String(n).repeat(16), parentSpanId: n === 1 ? undefined : '1'.repeat(16), name, kind: 'internal', startTime: [1_000, from * 1e6], endTime: [1_000, to * 1e6], attributes, status: error === undefined ? 'unset' : 'error', message: error, service: 's' }
}

t.test('the statuses of the list are the outcomes that the gateway counts', async t => {
  const nodes = await Promise.all([FakeNode.start(t, { role: 'encoder' }), FakeNode.start(t), FakeNode.start(t)])
  const [encoder, pd1, pd2] = nodes as [FakeNode, FakeNode, FakeNode]
  const store = new TraceStore()
  const { url, app } = await buildGateway(t, { nodes, options: { bypass: 'never', telemetry: { store } } })
  const ask = async (body: object): Promise<void> => { await (await post(`${url}/v1/chat/completions`, body)).arrayBuffer() }
  const picture = (seed: string): object => chat('?', pictureUrl(seed))
  for (const fault of ['rejected', 'failed', 'busy', 'reset'] as const) {
    for (const stream of [false, true]) {
      for (const node of [pd1, pd2]) node.generateFaults.push(fault, fault)
      await ask({ ...chat('?'), stream })
      for (const node of [pd1, pd2]) node.generateFaults.length = 0
    }
    encoder.encodeFaults.push(fault, fault)
    await ask(picture(fault))
    encoder.encodeFaults.length = 0
  }
  pd1.generateFaults.push('half')
  pd2.generateFaults.push('half')
  await ask({ ...chat('?'), stream: true })
  for (const node of [pd1, pd2]) node.generateFaults.length = 0
  await ask({ ...chat('?'), model: 'unknown' })
  await ask(picture('well'))
  const counted: Record<string, number> = {}
  await until(() => app.epd.gateway.inFlight === 0, 'all have ended')
  for (const { outcome, count } of app.epd.gateway.stats.requests()) counted[outcome] = (counted[outcome] ?? 0) + count
  const listed: Record<string, number> = {}
  for (const { status } of store.list({ limit: 1_000 })) listed[status] = (listed[status] ?? 0) + 1
  t.strictSame(listed, counted)
  t.ok(counted['refused']! >= 3 && counted['error']! >= 4 && counted['ok']! >= 1, JSON.stringify(counted))
  t.match(store.list({ search: 'unknown' })[0], { statusCode: 404, status: 'refused', failures: [] })
})

t.test('a failure has its code, message, node, stage and attempt; a request that went well in the end has them too', t => {
  const spans = [
    span('chat vlm', 1, 0, 90, { 'gen_ai.operation.name': 'chat', 'error.type': 'EPD_ERR_UPSTREAM_FAILED', 'http.response.status_code': 502, 'epd.retries': 1 }, 'no engine'),
    span('epd.plan', 2, 1, 2),
    span('epd.decode', 3, 3, 10, { 'epd.node': 'http://a', 'error.type': 'UNAVAILABLE' }, 'reset'),
    span('epd.plan', 4, 11, 12),
    span('epd.encode', 5, 13, 14, { 'error.type': 'EncodersExhausted' }, 'every encoder has failed'),
    span('epd.encode.call', 6, 13, 14, { 'epd.node': 'http://e', 'error.type': 'BUSY' }, 'full')
  ]
  const failures = [
    { attempt: 1, stage: 'decode', node: 'http://a', code: 'UNAVAILABLE', message: 'reset' },
    { attempt: 2, stage: 'encode', node: 'http://e', code: 'BUSY', message: 'full' }
  ]
  const summary = summarise(ID, spans)
  t.match(summary, { status: 'error', statusCode: 502, retries: 1, error: { code: 'EPD_ERR_UPSTREAM_FAILED', message: 'no engine' }, nodes: ['http://a', 'http://e'] })
  t.strictSame(summary.failures, failures)
  const well = summarise(ID, [span('chat vlm', 1, 0, 90, { 'gen_ai.operation.name': 'chat', 'epd.retries': 1 }), ...spans.slice(1)])
  t.match(well, { status: 'ok', error: undefined, failures })
  const many = Array.from({ length: 40 }, (_, n) => ({ ...span('epd.decode', 1, n, n + 1, {}, 'x'), spanId: String(n) }))
  t.equal(summarise(ID, many).failures.length, 16, 'within a bound')
  t.end()
})

t.test('tokens of a stream without usage are those of the engines\' spans', t => {
  const request = { 'gen_ai.operation.name': 'chat', 'gen_ai.response.time_to_first_chunk': 0.02 }
  const engine = [span('engine.prefill', 2, 5, 19, { 'gen_ai.usage.input_tokens': 64 }), span('engine.decode', 3, 19, 100, { 'gen_ai.usage.output_tokens': 9 })]
  t.match(summarise(ID, [span('chat vlm', 1, 0, 100, request), ...engine]), { inputTokens: 64, outputTokens: 9, firstTokenMs: 20, perTokenMs: 10, tokensPerSecond: 90 })
  t.match(summarise(ID, [span('chat vlm', 1, 0, 100, { ...request, 'gen_ai.usage.output_tokens': 5 }), ...engine]), { outputTokens: 5, perTokenMs: 20 }, 'the answer knows better')
  t.match(summarise(ID, [span('chat vlm', 1, 0, 100, request), span('llm_request', 2, 5, 99, { 'gen_ai.usage.completion_tokens': 3, 'gen_ai.usage.prompt_tokens': 12 })]), { inputTokens: 12, outputTokens: 3 }, 'vLLM\'s')
  t.match(summarise(ID, engine), { partial: true, outputTokens: 9, perTokenMs: undefined, tokensPerSecond: undefined }, 'a running request has no rate yet')
  for (const tokens of [0, 1]) t.equal(summarise(ID, [span('chat vlm', 1, 0, 100, { ...request, 'gen_ai.usage.output_tokens': tokens })]).perTokenMs, undefined)
  t.end()
})

t.test('names of spans are any text, those of an object\'s own members too', t => {
  for (const name of ['__proto__', 'constructor', 'toString', 'hasOwnProperty', '']) {
    const summary = summarise(ID, [span('chat vlm', 1, 0, 9, { 'gen_ai.operation.name': 'chat' }), span(name, 2, 1, 2, { 'epd.node': 'http://a', [name]: name }, 'x')])
    t.match(summary, { status: 'ok', failures: [], nodes: [] }, name)
  }
  t.end()
})

t.test('a search finds words in id, name, key, plan, status, nodes and errors, and all words must be there', t => {
  const summary = summarise(ID, [
    span('chat Tiny-VL', 1, 0, 9, { 'gen_ai.operation.name': 'chat', 'gen_ai.request.model': 'Tiny-VL', 'epd.key': 'team-a', 'epd.topology': 'e-pd', 'error.type': 'EPD_ERR_X', 'epd.encoders': ['http://e:1'] }, 'It broke (ECONNRESET)'),
    span('epd.decode', 2, 1, 9, { 'epd.node': 'http://10.0.0.7:8000', 'error.type': 'UNAVAILABLE' }, 'reset by peer'),
    { ...span('engine.decode', 3, 2, 8), instance: 'http://d:2' }
  ])
  const found = (search: string): boolean => matches(summary, { search } satisfies TraceFilter)
  for (const text of ['', '  ', ID, ID.slice(0, 6), 'tiny', 'TEAM-A', 'e-pd', 'error', 'epd_err_x', 'econnreset', '10.0.0.7', 'unavailable', 'by peer', ' tiny  team-a ', 'http://e:1', 'd:2']) t.ok(found(text), text)
  for (const text of ['tiny team-b', 'aborted', '.*', '10.0.0.8', '\0', 'undefined']) t.notOk(found(text), text)
  t.end()
})
