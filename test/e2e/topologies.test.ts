/** The same requests over every topology and both backends, through the gateway: the tokens must be the same on every way. */
import Fastify from 'fastify'
import t from 'tap'
import epd from '../../plugin/index.ts'
import type { Completion } from '../llm/harness.ts'
import { bodyOf, mixedRequests, outcome, type MixedRequest } from '../llm/mixed-requests.ts'
import { startEngineFor, type ApiServer } from '../helper/engine.ts'
import { metric } from '../helper/metrics.ts'
import { until } from '../helper/until.ts'

const FULL = process.env.EPD_TEST_FULL === '1'
/** With none to four pictures each. */
const REQUESTS = FULL ? 100 : 5
const DISTINCT_PICTURES = FULL ? 24 : 4
/** Requests in flight at a time: enough for batches of every size, few enough for two cores. */
const AT_ONCE = 8

/** A gateway that knows these engines and no others, every pair that belongs together linked. */
async function gatewayOver (engines: readonly ApiServer[], overlap = true): Promise<string> {
  const app = Fastify({ forceCloseConnections: true })
  t.teardown(() => app.close())
  await app.register(epd, { nodes: engines.map(({ url, engine: { role, backend } }) => ({ url, role, adapter: backend })), bypass: 'never', overlap })
  const url = await app.listen({ host: '127.0.0.1', port: 0 })
  await app.epd.nodes.waitFor(({ nodes, link }) => {
    const linked = (from: string, to: string): boolean => nodes.every(a => a.role !== from || nodes.every(b => b.role !== to || link(a.id, b.id) === 'linked'))
    return nodes.every(node => node.state === 'healthy') && linked('encoder', 'hybrid') && linked('encoder', 'prefill') && linked('prefill', 'decode')
  }, { signal: AbortSignal.timeout(20_000) })
  return url
}

interface Answer { readonly plan: string | null, readonly encoders: string | null, readonly outcome: string }

async function ask (gateway: string, request: MixedRequest): Promise<Answer> {
  const response = await fetch(`${gateway}/v1/chat/completions`, {
    method: 'POST', headers: { 'content-type': 'application/json' }, body: JSON.stringify({ model: 'tiny-internvl', ...bodyOf(request) })
  })
  const body = await response.json() as Completion
  return { plan: response.headers.get('x-epd-plan'), encoders: response.headers.get('x-epd-encoders'), outcome: response.status === 200 ? outcome(body) : JSON.stringify(body) }
}

async function askAll (gateway: string, requests: readonly MixedRequest[]): Promise<Answer[]> {
  const answers: Answer[] = []
  for (let i = 0; i < requests.length; i += AT_ONCE) answers.push(...await Promise.all(requests.slice(i, i + AT_ONCE).map(request => ask(gateway, request))))
  return answers
}

/** Features that encoders have offered and that were pulled, or found no room. */
async function offersTaken (engines: readonly ApiServer[]): Promise<number> {
  const all = await Promise.all(engines.map(async ({ url }) => {
    const text = await (await fetch(`${url}/metrics`)).text()
    return ['pulled', 'dropped'].reduce((sum, outcome) => sum + metric(text, 'epd_ahead_items_total', { outcome })!, 0)
  }))
  return all.reduce((sum, count) => sum + count, 0)
}

const [encoder, hybrid, prefill, decode, turbomind] = await Promise.all([
  startEngineFor(t, { role: 'encoder' }),
  startEngineFor(t, { role: 'hybrid', vision: true }),
  startEngineFor(t, { role: 'prefill' }),
  startEngineFor(t, { role: 'decode', vision: true }),
  startEngineFor(t, { role: 'hybrid', backend: 'turbomind', vision: true })
])
const requests = await mixedRequests(REQUESTS, DISTINCT_PICTURES)
const expected = (await askAll(await gatewayOver([hybrid]), requests)).map(answer => answer.outcome)
t.ok(new Set(expected).size > REQUESTS / 3, 'the answers differ from each other')

interface Topology { readonly title: string, readonly engines: readonly ApiServer[], readonly text: string, readonly pictures: string, readonly overlap?: boolean }

const topologies: readonly Topology[] = [
  { title: 'E -> PD', engines: [encoder, hybrid], text: 'pd', pictures: 'e-pd' },
  { title: 'E -> PD, without overlap', engines: [encoder, hybrid], text: 'pd', pictures: 'e-pd', overlap: false },
  { title: 'P -> D, P encodes', engines: [prefill, decode], text: 'p-d', pictures: 'p-d' },
  { title: 'E -> P -> D', engines: [encoder, prefill, decode], text: 'p-d', pictures: 'e-p-d' },
  { title: 'E -> P -> D, without overlap', engines: [encoder, prefill, decode], text: 'p-d', pictures: 'e-p-d', overlap: false },
  { title: 'TurboMind-like, encodes itself', engines: [turbomind], text: 'pd', pictures: 'hybrid' },
  { title: 'E -> TurboMind-like', engines: [encoder, turbomind], text: 'pd', pictures: 'e-pd' }
]

for (const { title, engines, text, pictures, overlap } of topologies) {
  await t.test(`${title}: the tokens are those of a hybrid engine`, async t => {
    // What an earlier topology has left behind must not answer for this one.
    for (const { url } of engines) await fetch(`${url}/distserve/clear_cache`, { method: 'POST' })
    const before = await offersTaken(engines)
    const answers = await askAll(await gatewayOver(engines, overlap), requests)
    t.same(answers.map(answer => answer.outcome), expected)
    t.same(answers.map(answer => answer.plan), requests.map(({ urls }) => urls.length === 0 ? text : pictures))
    if (overlap === false) t.equal(await offersTaken(engines), before, 'nothing is pulled ahead')
    const encodes = engines.includes(encoder)
    t.same(answers.map(answer => answer.encoders), requests.map(({ urls }) => urls.length === 0 || !encodes ? null : urls.map(() => encoder.url).join(',')))
  })
}

t.test('and every engine is at rest', async t => {
  for (const { url } of [encoder, hybrid, prefill, decode, turbomind]) {
    const read = async (): Promise<(name: string) => number> => {
      const text = await (await fetch(`${url}/metrics`)).text()
      return name => metric(text, `epd_${name}`) ?? 0
    }
    await until(async () => {
      const value = await read()
      return value('leases_open') === 0 && ['feature', 'kv'].every(pool => value(`${pool}_blocks_free`) + value(`${pool}_blocks_cached`) === value(`${pool}_blocks_total`))
    }, `${url} is at rest`)
    await fetch(`${url}/distserve/clear_cache`, { method: 'POST' })
    const value = await read()
    t.same(['feature', 'kv'].map(pool => value(`${pool}_blocks_free`)), ['feature', 'kv'].map(pool => value(`${pool}_blocks_total`)))
  }
})
