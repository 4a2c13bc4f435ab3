/** E -> P -> D with real engines, embedded as a newcomer would have them, beside one that does both. */
import t from 'tap'
import { startCli } from '../helper/cli.ts'
import { listenerPid } from '../helper/listener.ts'
import { metric } from '../helper/metrics.ts'
import { drawScene } from '../helper/scenes.ts'
import { until } from '../helper/until.ts'

const FULL = process.env.EPD_TEST_FULL === '1'
const QUESTIONS = FULL ? 60 : 3
const ROLES = { hybrid: 1, prefill: 2, decode: 3, encoder: 4 } as const

interface NodeStatus { readonly role: number, readonly health: string, readonly unfinished: number, readonly links: Record<string, { state: string }> }
interface Answer { readonly status: number, readonly plan: string | null, readonly text: string, readonly trace: string | null, readonly usage?: Record<string, unknown> }

const config = t.testdir({
  'epd.config.json': JSON.stringify({ embedded: { encoders: 1, engines: 1, prefill: 1, decode: 1 }, routing: { disaggregate: 'always' } })
})
const gateway = await startCli(t, ['serve', '--config', `${config}/epd.config.json`, '--port', '0', '--log-level', 'warn'])

async function status (): Promise<Record<string, NodeStatus>> {
  return await (await fetch(`${gateway.url}/nodes/status`)).json() as Record<string, NodeStatus>
}

async function urlOf (role: keyof typeof ROLES): Promise<string> {
  const found = Object.entries(await status()).find(([, node]) => node.role === ROLES[role] && node.health === 'healthy')
  if (found === undefined) throw new Error(`no healthy ${role}`)
  return found[0]
}

async function ask (base: string, question: string, picture?: string, more: object = {}): Promise<Answer> {
  const content = [...(picture === undefined ? [] : [{ type: 'image_url', image_url: { url: picture } }]), { type: 'text', text: question }]
  const response = await fetch(`${base}/v1/chat/completions`, {
    method: 'POST',
    headers: { 'content-type': 'application/json' },
    body: JSON.stringify({ model: 'tiny-internvl', temperature: 0, messages: [{ role: 'user', content }], ...more })
  })
  const body = await response.text()
  const head = { status: response.status, plan: response.headers.get('x-epd-plan'), trace: response.headers.get('x-epd-trace-id') }
  if (response.headers.get('content-type')?.startsWith('text/event-stream') === true) {
    const deltas = [...body.matchAll(/^data: (\{.*\})$/gm)].map(found => JSON.parse(found[1]!) as { choices: Array<{ delta?: { content?: string } }> })
    return { ...head, text: deltas.map(({ choices }) => choices[0]?.delta?.content ?? '').join('') }
  }
  const json = JSON.parse(body) as { choices?: Array<{ message: { content: string } }>, usage?: Record<string, unknown> }
  return { ...head, text: json.choices?.[0]?.message.content ?? body, ...(json.usage === undefined ? {} : { usage: json.usage }) }
}

async function openLeases (): Promise<number> {
  const nodes = Object.entries(await status()).filter(([, node]) => node.health === 'healthy')
  const counts = await Promise.all(nodes.map(async ([url]) => metric(await (await fetch(`${url}/metrics`)).text(), 'epd_leases_open') ?? 0))
  return counts.reduce((sum, count) => sum + count, 0)
}

await t.test('three engines answer as one does: text and pictures, whole and streamed', async t => {
  const hybrid = await urlOf('hybrid')
  for (let i = 0; i < QUESTIONS; i++) {
    const picture = i % 3 === 2 ? undefined : await drawScene(500 + i)
    const question = picture === undefined ? 'What is a circle?' : ['How many shapes are there?', 'Describe the picture.'][i % 2]!
    const one = await ask(hybrid, question, picture)
    const disaggregated = await ask(gateway.url, question, picture)
    t.equal(disaggregated.plan, picture === undefined ? 'p-d' : 'e-p-d')
    t.equal(disaggregated.text, one.text)
    t.match(disaggregated.usage, { prompt_tokens: one.usage!.prompt_tokens, completion_tokens: one.usage!.completion_tokens })
    t.equal((await ask(gateway.url, question, picture, { stream: true })).text, one.text)
    const short = { max_tokens: 1, logprobs: true }
    t.equal((await ask(gateway.url, question, picture, short)).text, (await ask(hybrid, question, picture, short)).text, 'a single token, too')
  }
  await until(async () => await openLeases() === 0, 'no lease is open')
})

await t.test('its trace has the hand-off, and both migrations', async t => {
  const { trace } = await ask(gateway.url, 'How many shapes are there?', await drawScene(600))
  interface Span { readonly name: string, readonly spanId: string, readonly parentSpanId: string | null, readonly attributes: Record<string, unknown> }
  const spans = await until(async () => {
    const found = (await (await fetch(`${gateway.url}/epd/traces/${trace}`)).json() as { spans?: Span[] }).spans ?? []
    return found.filter(({ name }) => name === 'engine.migrate').length === 2 && found.some(({ name }) => name === 'engine.decode') ? found : undefined
  }, 'all spans are there')
  const named = (name: string): Span[] => spans.filter(span => span.name === name)
  const [prefill, decode] = [named('epd.prefill')[0]!, named('epd.decode')[0]!]
  t.match(prefill.attributes, { 'epd.node': await urlOf('prefill'), 'epd.tokens': Number })
  t.equal(decode.attributes['epd.node'], await urlOf('decode'))
  t.same(named('engine.migrate').map(span => span.parentSpanId), [prefill.spanId, decode.spanId])
  t.equal(named('engine.migrate')[1]!.attributes['epd.peer'], prefill.attributes['epd.node'])
  t.equal(named('engine.prefill')[0]!.parentSpanId, prefill.spanId)
  const metrics = await (await fetch(`${gateway.url}/metrics`)).text()
  t.match(metrics, /epd_stage_duration_seconds_count\{[^}]*epd_stage="prefill"[^}]*\} [1-9]/)
  t.match(metrics, /epd_requests_total\{[^}]*epd_topology="e-p-d"[^}]*\} [1-9]/)
})

// test/chaos/handoffs kills nodes of both roles.
for (const role of FULL ? ['prefill', 'decode'] as const : ['prefill'] as const) {
  await t.test(`the ${role} engine is killed during requests: each gets its answer, and the next ones are disaggregated again`, async t => {
    const url = await urlOf(role)
    const asked = Array.from({ length: 4 }, async (_, i) => await ask(gateway.url, 'Describe the picture.', await drawScene(700 + 10 * ROLES[role] + i)))
    await until(async () => (await status())[url]!.unfinished > 0, 'a request is there')
    process.kill(await listenerPid(Number(new URL(url).port)), 'SIGKILL')
    for (const answer of await Promise.all(asked)) t.ok([200, 502, 503].includes(answer.status), `${answer.status} ${answer.plan}`)
    await until(async () => (await status())[url] === undefined && await urlOf(role).catch(() => undefined), 'its successor is there', 60_000, 30)
    const picture = await drawScene(800)
    await until(async () => (await ask(gateway.url, 'How many shapes are there?', picture)).plan === 'e-p-d', 'it takes part')
    await until(async () => await openLeases() === 0, 'no lease is open')
  })
}
