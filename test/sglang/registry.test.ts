/** Encoders of SGLang join and leave by the routes of its own registry. */
import t, { type Test } from 'tap'
import { buildGateway } from '../helper/fake-gateway.ts'
import { FakeNode } from '../helper/fake-node.ts'
import { FakeSglangEncoder } from '../helper/fake-sglang.ts'
import { until } from '../helper/until.ts'

const ask = async (method: string, url: string, body?: unknown, headers: Record<string, string> = {}): Promise<{ status: number, text: string }> => {
  const answer = await fetch(url, { method, headers: { ...(body === undefined ? {} : { 'content-type': 'application/json' }), ...headers }, ...(body === undefined ? {} : { body: JSON.stringify(body) }) })
  return { status: answer.status, text: await answer.text() }
}

const listed = async (url: string): Promise<string[]> => (JSON.parse((await ask('GET', `${url}/list_encoder_urls`)).text) as { encoder_urls: string[] }).encoder_urls

async function joined (t: Test): Promise<{ url: string, encoder: FakeSglangEncoder, app: Awaited<ReturnType<typeof buildGateway>>['app'] }> {
  const encoder = await FakeSglangEncoder.start(t)
  const { url, app } = await buildGateway(t)
  t.match(await encoder.register(url).then(async answer => [answer.status, await answer.text()]), [200, 'OK'])
  await app.epd.nodes.waitFor(snapshot => snapshot.byId.get(encoder.url)?.state === 'healthy', { signal: AbortSignal.timeout(10_000) })
  return { url, encoder, app }
}

t.test('an encoder registers itself, is a node like any other, and leaves', async t => {
  const { url, encoder, app } = await joined(t)
  t.match(app.epd.nodes.get(encoder.url), { role: 'encoder', adapter: { name: 'sglang' }, models: [], info: { backend: 'sglang encoder' } })
  t.match(app.epd.nodes.status()[encoder.url], { role: 4, health: 'healthy', breakers: { encode: 'closed' } })
  t.same(await listed(url), [encoder.url])
  t.equal((await encoder.register(url)).status, 200, 'a second time')
  t.match(await ask('DELETE', `${url}/unregister_encoder_url`, { url: encoder.url }), { status: 200, text: 'OK' })
  t.match(await ask('DELETE', `${url}/unregister_encoder_url`, { url: encoder.url }), { status: 200, text: 'OK' }, 'one that is not there')
  t.equal(app.epd.nodes.get(encoder.url), undefined)
  t.same(await listed(url), [])
})

t.test('an encoder that dies stays a node and leaves the list; it comes back by itself', async t => {
  const { url, encoder, app } = await joined(t)
  await encoder.kill()
  app.epd.nodes.probe(encoder.url)
  await until(async () => (await listed(url)).length === 0, 'the dead encoder is off the list')
  t.equal(app.epd.nodes.get(encoder.url)?.state, 'unhealthy')
  await encoder.listen()
  app.epd.nodes.probe(encoder.url)
  await until(async () => (await listed(url)).length === 1, 'it is back')
})

t.test('an encoder that calls itself unhealthy is not used', async t => {
  const { encoder, app } = await joined(t)
  encoder.healthy = false
  await until(() => { app.epd.nodes.probe(encoder.url); return app.epd.nodes.get(encoder.url)?.state === 'unhealthy' }, 'two probes have failed')
  t.match(app.epd.nodes.get(encoder.url)?.notes, [/answered \/health with 503/])
})

t.test('bad registrations are refused, and only encoders of SGLang can be taken out', async t => {
  const node = await FakeNode.start(t)
  const { url, app } = await buildGateway(t, { nodes: [node] })
  for (const [body, error] of [[{}, "Missing or empty 'url' field"], [{ url: '' }, "Missing or empty 'url' field"], [[], "Missing or empty 'url' field"], [{ url: 7 }, "Missing or empty 'url' field"], [{ url: 'ftp://x' }, 'node url "ftp://x" must be http or https']] as const) {
    const answer = await ask('POST', `${url}/register_encoder_url`, body)
    t.equal(answer.status, 400)
    t.same(JSON.parse(answer.text), { error })
  }
  t.equal((await ask('DELETE', `${url}/unregister_encoder_url`, {})).status, 400)
  t.match(await ask('DELETE', `${url}/unregister_encoder_url`, { url: node.url }), { status: 200 })
  t.ok(app.epd.nodes.get(node.url), 'a node of another kind stays')
})

t.test('the routes answer operators only, lie below the prefix, and can be left out', async t => {
  const { url } = await buildGateway(t, { options: { prefix: '/llm' } })
  const forwarded = { 'x-forwarded-for': '203.0.113.9' }
  t.equal((await ask('POST', `${url}/llm/register_encoder_url`, { url: 'http://127.0.0.1:1' }, forwarded)).status, 403)
  t.equal((await ask('GET', `${url}/llm/list_encoder_urls`, undefined, forwarded)).status, 403)
  t.equal((await ask('GET', `${url}/list_encoder_urls`)).status, 404)
  const without = await buildGateway(t, { options: { routes: { sglang: false } } })
  t.equal((await ask('GET', `${without.url}/list_encoder_urls`)).status, 404)
})
