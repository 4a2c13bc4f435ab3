/** What a real gateway with real engines reports of its requests: in traces, in metrics, and in its logs. */
import t from 'tap'
import { Agent, request } from 'undici'
import { fetchTrace } from '../../plugin/cli/trace.ts'
import type { SpanView } from '../../plugin/traces/view.ts'
import { startCli } from '../helper/cli.ts'
import { metric } from '../helper/metrics.ts'
import { median } from '../bench/report.ts'
import { tempFile } from '../helper/temp.ts'
import { until } from '../helper/until.ts'
import { question, samplePictures } from '../ui/load.ts'

const KEY = 'sk-secret-of-a-client'
const ADMIN = 'secret-of-the-operator'
const PROMPT = 'a very private question'

// Engines are started, and pictures encoded.
t.setTimeout(120_000)
const config = await tempFile(t, 'epd.config.json', JSON.stringify({ embedded: true, apiKeys: [KEY], adminKey: ADMIN }))
const gateway = await startCli(t, ['serve', '--port', '0', '--log-level', 'trace', '--config', config])
const pictures = await samplePictures()
const dispatcher = new Agent()
t.teardown(() => dispatcher.close())

/** Milliseconds from the head of the request to the last byte, by the client's own clock. */
async function ask (body: object): Promise<{ status: number, traceId: string, took: number }> {
  const started = performance.now()
  const answer = await request(`${gateway.url}/v1/chat/completions`, {
    method: 'POST', dispatcher, headers: { 'content-type': 'application/json', authorization: `Bearer ${KEY}` }, body: JSON.stringify(body)
  })
  await answer.body.dump()
  return { status: answer.statusCode, traceId: String(answer.headers['x-epd-trace-id']), took: performance.now() - started }
}

/** The same picture as other bytes: one that no cache has seen. What follows a PNG's end is not looked at. */
function another (url: string, salt: string): string {
  const [head, base64] = url.split(',') as [string, string]
  return `${head},${Buffer.concat([Buffer.from(base64, 'base64'), Buffer.from(salt)]).toString('base64')}`
}

/** Length of the union of the spans' times, in milliseconds. */
function union (spans: readonly SpanView[]): number {
  let covered = 0
  let end = -Infinity
  for (const { offsetMs, durationMs } of [...spans].sort((a, b) => a.offsetMs - b.offsetMs)) {
    covered += Math.max(0, offsetMs + durationMs - Math.max(offsetMs, end))
    end = Math.max(end, offsetMs + durationMs)
  }
  return covered
}

t.test('the stages of a waterfall cover the time the client has waited, within 5 %', async t => {
  for (let n = 0; n < 4; n++) await ask(question(pictures, n, 1))
  const shares: number[] = []
  const ends: number[] = []
  for (let n = 0; n < 3; n++) {
    const { status, traceId, took } = await ask(question(Array.from({ length: 6 }, (_, i) => another(pictures[0]!, `${n} ${i}`)), 0, 6))
    t.equal(status, 200)
    const trace = (await fetchTrace({ url: gateway.url, adminKey: ADMIN }, traceId))!
    const root = trace.spans.find(span => span.name.startsWith('chat '))!
    const stages = trace.spans.filter(span => span.parentSpanId === root.spanId)
    t.strictSame(stages.map(span => span.name).filter(name => name !== 'epd.receive'), ['epd.plan', 'epd.encode', 'epd.decode'])
    for (const name of ['engine.migrate', 'engine.prefill', 'engine.decode']) t.ok(trace.spans.some(span => span.name === name), name)
    shares.push(union(stages) / took)
    ends.push(Math.max(...trace.spans.map(span => span.offsetMs + span.durationMs)) - root.durationMs - root.offsetMs)
  }
  const share = median(shares)
  t.ok(share >= 0.95 && share <= 1.0, `${(100 * share).toFixed(1)} % of the client's time`)
  t.ok(Math.max(...ends) < 5, 'and nothing of a trace lies beyond the request')
})

t.test('the gateway\'s metrics know what its engines have done', async t => {
  const page = (): Promise<string> => fetch(`${gateway.url}/metrics`).then(answer => answer.text())
  await until(async () => metric(await page(), 'epd_gateway_migrated_bytes_total'), 'bytes over the link are known')
  const text = await page()
  t.ok(metric(text, 'epd_gateway_encoder_cache_hits_total')! > 0)
  t.ok(metric(text, 'gen_ai_server_time_per_output_token_seconds_count')! > 0)
})

t.test('log lines of a request have its id and its trace, and never prompts, pictures or keys', async t => {
  const media = (url: string): object => ({ type: 'image_url', image_url: { url } })
  const content = (...parts: object[]): object => ({ model: 'tiny-internvl', messages: [{ role: 'user', content: [...parts, { type: 'text', text: PROMPT }] }] })
  t.equal((await ask(content(media(pictures[0]!)))).status, 200)
  const refused = [
    await ask(content(media('data:image/png;base64,' + Buffer.from('this is no picture at all').toString('base64')))),
    await ask(content(media('http://127.0.0.1:9/private.png?token=secret-in-a-url'))),
    await ask({ ...content(), model: 'unknown-model' })
  ]
  for (const { status } of refused) t.ok(status >= 400)
  const stop = new AbortController()
  const left = fetch(`${gateway.url}/v1/chat/completions`, {
    method: 'POST', headers: { 'content-type': 'application/json', authorization: `Bearer ${KEY}` }, signal: stop.signal, body: JSON.stringify({ ...content(media(pictures[1]!)), stream: true })
  })
  stop.abort()
  await left.catch(() => {})
  await until(() => gateway.stderr().includes('request refused'), 'the log is written')
  t.equal(await gateway.stop(), 0)
  const log = gateway.stderr()
  const lines = log.split('\n').filter(line => line.startsWith('{')).map(line => JSON.parse(line) as Record<string, unknown>)
  const ofRequests = lines.filter(line => line.reqId !== undefined)
  t.ok(ofRequests.length >= 3)
  for (const line of ofRequests) if (!/^[0-9a-f]{32}$/.test(String(line.trace_id))) t.fail(JSON.stringify(line))
  t.ok(refused.every(({ traceId }) => ofRequests.some(line => line.trace_id === traceId)), 'the trace is the one in the client\'s headers')
  for (const secret of [KEY, ADMIN, PROMPT, 'secret-in-a-url', pictures[0]!.slice(40, 80), pictures[1]!.slice(40, 80), Buffer.from('this is no picture').toString('base64').slice(0, 20)]) {
    t.notOk(log.includes(secret), `not in the log: ${secret.slice(0, 24)}`)
  }
})
