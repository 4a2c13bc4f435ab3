/** `fastify-epd trace --last`, `--errors` and `--compare`. */
import t from 'tap'
import { renderComparison } from '../../plugin/cli/trace-comparison.ts'
import { traceFlags } from '../../plugin/cli/trace.ts'
import { UsageError } from '../../plugin/cli/usage.ts'
import type { SpanView, TraceView } from '../../plugin/traces/view.ts'
import { runCommand } from '../helper/cli.ts'
import { FakeNode } from '../helper/fake-node.ts'
import { buildGateway, chat, pictureUrl, post } from '../helper/fake-gateway.ts'

t.test('the last requests are lines, with what failed below; two of them are compared', async t => {
  const [encoder, one, two] = await Promise.all([FakeNode.start(t, { role: 'encoder' }), FakeNode.start(t), FakeNode.start(t)])
  const { url } = await buildGateway(t, { nodes: [encoder, one, two] })
  const ask = async (...pictures: string[]): Promise<{ id: string, status: number }> => {
    const answer = await post(`${url}/v1/chat/completions`, chat('Hello', ...pictures))
    await answer.text()
    return { id: answer.headers.get('x-epd-trace-id')!, status: answer.status }
  }
  const good = await ask()
  for (const node of [one, two]) node.generateFaults.push('failed')
  const retried = await ask(pictureUrl(1))
  for (const node of [one, two]) node.generateFaults.push('rejected', 'rejected')
  const refused = await ask()
  t.match([good.status, refused.status], [200, 400])

  const trace = async (...args: string[]): Promise<{ code: number | null, stdout: string, stderr: string }> => await runCommand(['trace', '--url', url, ...args])
  const [last, errors, machine, searched, none, compared, same] = await Promise.all([
    trace('--last', '20'), trace('--last', '1', '--errors'), trace('--last', '2', '--json'), trace('--last', '5', '--search', good.id),
    trace('--last', '5', '--search', 'nowhere'), trace('--compare', good.id, retried.id), trace('--compare', good.id, good.id)
  ])
  const ids = (text: string): string[] => text.match(/\b[0-9a-f]{32}\b/g) ?? []
  t.same(ids(last.stdout), [good.id, retried.id, refused.id], 'the last one at the end')
  t.match(last.stdout, /ok 200 +vlm +pd/)
  t.match(last.stdout, /attempt 1, decode at http:\/\/127.0.0.1:\d+: .*scripted failed/)
  t.match(last.stdout, /refused 400 +vlm/)
  t.same(ids(errors.stdout), [refused.id])
  t.match(JSON.parse(machine.stdout), [{ traceId: refused.id }, { traceId: retried.id }])
  t.same(ids(searched.stdout), [good.id])
  t.match(none, { code: 1, stdout: '', stderr: /no such traces/ })
  t.match(compared.stdout, /plan +pd +e-pd/)
  t.match(compared.stdout, /\n {2}epd\.encode( \(0 and \d\))? +- +[\d.]+ m?s +only in B/)
  t.match(compared.stdout, /\n {2}epd\.decode .*[+-][\d.]+ m?s \([+-]\d+ %\)/)
  t.notMatch(same.stdout, /only in|\|/)
})

t.test('mistakes are named', async t => {
  const id = 'a'.repeat(32)
  const cases: ReadonlyArray<readonly [args: string[], message: RegExp]> = [
    [['--compare', id], /give the two trace ids/],
    [['--compare', id, id, id], /give the two trace ids/],
    [['--compare', id, 'b'], /32 hexadecimal digits, not 'b'/],
    [[id, id], /one trace id at most/],
    [['--last', '0'], /--last must be a whole number from 1 to 1000/],
    [['--last', '2', '--follow'], /exclude each other/],
    [['--last', '2', id], /--last takes no trace id/],
    [['--errors', id], /needs no filter/]
  ]
  for (const [args, message] of cases) t.throws(() => traceFlags(args), { constructor: UsageError, message }, args.join(' '))
})

function traceOf (id: string, ...spans: Array<Partial<SpanView>>): TraceView {
  const whole: SpanView = { traceId: id, spanId: 's', parentSpanId: null, name: 'x', kind: 'internal', start: '', end: '', offsetMs: 0, durationMs: 10, attributes: {}, status: { code: 'ok' }, service: '', instance: null }
  return {
    traceId: id,
    name: 'chat',
    model: undefined,
    key: undefined,
    plan: undefined,
    reason: undefined,
    status: 'ok',
    statusCode: 200,
    error: undefined,
    failures: [],
    retries: 0,
    start: '',
    durationMs: 10,
    partial: false,
    items: 0,
    encoders: [],
    nodes: [],
    inputTokens: undefined,
    outputTokens: undefined,
    firstTokenMs: undefined,
    perTokenMs: undefined,
    tokensPerSecond: undefined,
    spans: spans.map(span => ({ ...whole, ...span }))
  }
}

t.test('stages are matched by their names and parents; several of one name are one stage; facts of both are shown', async t => {
  const root = (model: string): Partial<SpanView> => ({ spanId: 'r', name: `chat ${model}`, attributes: { 'gen_ai.operation.name': 'chat' } })
  const call = (n: number, node: string): Partial<SpanView> => ({ spanId: `c${n}`, parentSpanId: 'r', name: 'epd.encode.call', durationMs: 4, attributes: { 'epd.node': node, 'epd.items': 1 } })
  const a = traceOf('1'.repeat(32), root('a'), call(1, 'http://e1'), call(2, 'http://e2'), { spanId: 'd', parentSpanId: 'r', name: 'epd.decode', durationMs: 0 })
  const b = traceOf('2'.repeat(32), root('b\x1b[2J'), call(1, 'http://e1\x1b[2J'), { spanId: 'p', parentSpanId: 'r', name: 'epd.prefill' }, { spanId: 'd', parentSpanId: 'r', name: 'epd.decode', durationMs: 1.5 })
  const text = renderComparison(a, b)
  t.match(text, /\nchat a +10\.0 ms +10\.0 ms +\+0\.00 ms \(\+0 %\)/)
  t.match(text, /\n {2}epd\.encode\.call \(2 and 1\) +8\.00 ms +4\.00 ms +-4\.00 ms \(-50 %\) +e1 {2}e2 \| e1 \[2J\n/)
  t.match(text, /\n {2}epd\.prefill +- +10\.0 ms +only in B\n {2}epd\.decode +0\.00 ms +1\.50 ms +\+1\.50 ms\n/)
  // eslint-disable-next-line no-control-regex
  t.notMatch(text, /[\x00-\x09\x0b-\x1f]/)
})
