/** Prefill and decode servers of SGLang: both get a request at once, and meet by bootstrap_room. */
import t, { type Test } from 'tap'
import { buildGateway, chat, pictureUrl, post } from '../helper/fake-gateway.ts'
import { FakeSglangEncoder, FakeSglangLm } from '../helper/fake-sglang.ts'
import { until } from '../helper/until.ts'

async function fixture (t: Test, kvTransfer = 'mooncake') {
  const encoder = await FakeSglangEncoder.start(t)
  const { url, app } = await buildGateway(t, { options: { nodes: [encoder.spec], routing: { disaggregate: 'always' } } })
  const p = await FakeSglangLm.start(t, { mode: 'prefill', encoderUrls: [`${url}/sglang/v/0`, `${url}/sglang/v/1`] })
  const d = await FakeSglangLm.start(t, { mode: 'decode', languageOnly: false, kvTransfer })
  for (const { spec } of [p, d]) app.epd.nodes.add(spec)
  await app.epd.nodes.waitFor(({ nodes, link }) => nodes.length === 3 && nodes.every(node => node.state === 'healthy') && !['none', 'linking'].includes(link(p.url, d.url)), { signal: AbortSignal.timeout(10_000) })
  return { encoder, p, d, url, app, ask: async (body: object, init: RequestInit = {}) => await post(`${url}/v1/chat/completions`, { ...body, model: 'tiny' }, init) }
}

for (const stream of [false, true]) {
  t.test(`text and pictures${stream ? ', as a stream' : ''}`, async t => {
    const f = await fixture(t)
    const text = await f.ask({ ...chat('?'), stream })
    t.equal(text.headers.get('x-epd-plan'), 'p-d')
    await text.text()
    const seen = await f.ask({ ...chat('?', pictureUrl('a')), stream, bootstrap_room: 1 })
    t.equal(seen.headers.get('x-epd-plan'), 'e-p-d')
    t.equal(seen.headers.get('x-epd-encoders'), f.encoder.url)
    t.match(await seen.text(), /saw \w{8}/)
    for (const i of [0, 1]) {
      const [prefill, decode] = [f.p.generations[i]!.body, f.d.generations[i]!.body]
      const room = { bootstrap_host: '127.0.0.1', bootstrap_port: Number(new URL(f.p.url).port), bootstrap_room: prefill.bootstrap_room }
      t.match(prefill, room)
      t.match(decode, room)
      t.same({ ...prefill, rid: '' }, { ...decode, rid: '' }, 'the same request')
    }
    t.not(f.p.generations[0]!.body.bootstrap_room, f.p.generations[1]!.body.bootstrap_room)
    await until(() => f.p.answered.length === 2, "P's answers are read to their end")
  })
}

t.test("P's failure is the request's: a 4xx goes to the client, another starts again, and D waits for neither", async t => {
  const f = await fixture(t)
  f.p.fails = 400
  const refused = await f.ask(chat('?'))
  t.equal(refused.status, 400)
  t.match(await refused.json(), { error: { message: 'scripted' } })
  f.p.fails = 500
  t.equal((await f.ask(chat('?'))).status, 503)
  f.p.fails = undefined
  t.equal((await f.ask(chat('?'))).status, 200)
  t.equal(f.p.died, undefined)
})

t.test("a client that leaves ends P's half too, and one that waits for embeddings is not cut", async t => {
  const f = await fixture(t)
  await f.d.kill()
  t.equal((await f.ask(chat('?'))).status, 503)
  await f.d.listen()
  await until(() => { f.app.epd.nodes.probe(f.d.url); return f.app.epd.nodes.get(f.d.url)?.state === 'healthy' && f.app.epd.nodes.snapshot().link(f.p.url, f.d.url) === 'linked' }, 'D is back')
  let release!: () => void
  f.encoder.faults.push({ hold: new Promise<void>(resolve => { release = resolve }) })
  const leaving = new AbortController()
  const left = f.ask(chat('?', pictureUrl('a')), { signal: leaving.signal }).catch((error: Error) => error.name)
  await until(() => f.p.waiting === 1, 'P waits for embeddings')
  leaving.abort()
  t.equal(await left, 'AbortError')
  await until(() => f.app.epd.gateway.inFlight === 1, 'only the encode goes on')
  release()
  await until(() => f.app.epd.gateway.inFlight === 0, 'it is done')
  t.equal(f.p.died, undefined)
})

t.test('servers that move KV blocks differently are not paired', async t => {
  const f = await fixture(t, 'nixl')
  t.match(Object.values(f.app.epd.nodes.status()[f.p.url]!.links), [{ state: 'refused', reason: /--disaggregation-transfer-backend/ }])
  t.equal((await f.ask(chat('?'))).status, 503)
})
