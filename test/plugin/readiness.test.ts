/** /livez and /readyz, as a load balancer and an orchestrator ask them. */
import t from 'tap'
import { FakeNode } from '../helper/fake-node.ts'
import { buildGateway, chat, post } from '../helper/fake-gateway.ts'
import { until } from '../helper/until.ts'

async function ready (url: string, query = ''): Promise<{ status: number, body: any }> {
  const answer = await fetch(`${url}/readyz${query}`)
  return { status: answer.status, body: await answer.json() }
}

t.test('a gateway without nodes lives and is not ready', async t => {
  const { url } = await buildGateway(t)
  t.equal((await fetch(`${url}/livez`)).status, 200)
  t.same(await ready(url), { status: 503, body: { status: 'not_ready', why: 'no node is registered', models: {} } })
})

t.test('each model and role is listed with why it is not ready', async t => {
  const [encoder, hybrid, prefill, decode] = await Promise.all([
    FakeNode.start(t, { role: 'encoder', models: ['a', 'b'] }),
    FakeNode.start(t, { models: ['a'] }),
    FakeNode.start(t, { role: 'prefill', models: ['b'] }),
    FakeNode.start(t, { role: 'decode', models: ['b'] })
  ])
  const { app, url } = await buildGateway(t, { nodes: [encoder, hybrid, prefill, decode] })
  const one = { healthy: 1, total: 1 }
  t.same(await ready(url), {
    status: 200,
    body: { status: 'ready', models: { a: { ready: true, roles: { encoder: one, hybrid: one } }, b: { ready: true, roles: { encoder: one, prefill: one, decode: one } } } }
  })
  await prefill.close()
  app.epd.nodes.probe(prefill.url)
  await until(() => app.epd.nodes.get(prefill.url)!.state === 'unhealthy', 'the prefill node is unhealthy')
  const half = await ready(url)
  t.equal(half.status, 200, 'another model is served')
  t.match(half.body.models.b, { ready: false, why: 'no prefill node is healthy', roles: { prefill: { healthy: 0, total: 1, why: '1 unhealthy' }, decode: one } })
  t.match(await ready(url, '?model=b'), { status: 503, body: { status: 'not_ready', why: 'no prefill node is healthy' } })
  t.match(await ready(url, '?model=a'), { status: 200, body: { status: 'ready' } })
  t.match(await ready(url, '?model=constructor'), { status: 503, body: { why: 'no node serves this model', models: {} } })
  t.notMatch(JSON.stringify(half.body), /127\.0\.0\.1/, 'no node is named to whoever asks')
})

for (const [what, roles, why] of [
  ['only encoders', ['encoder'], 'no node of this model generates'],
  ['decode nodes alone', ['decode'], 'its decode nodes have no prefill node']
] as const) {
  t.test(`a model with ${what} is not ready`, async t => {
    const nodes = await Promise.all(roles.map(async role => await FakeNode.start(t, { role })))
    const { url } = await buildGateway(t, { nodes })
    t.match(await ready(url), { status: 503, body: { why: 'no model has the nodes that it needs', models: { vlm: { ready: false, why } } } })
  })
}

t.test('/readyz agrees with what a request gets, whatever nodes there are', async t => {
  const up = await FakeNode.start(t)
  const { app, url } = await buildGateway(t, { nodes: [up] })
  for (const node of [up, undefined]) {
    if (node === undefined) {
      await up.close()
      app.epd.nodes.probe(up.url)
      await until(() => app.epd.nodes.get(up.url)!.state === 'unhealthy', 'it is unhealthy')
    }
    const { status } = await post(`${url}/v1/chat/completions`, chat('?'))
    t.equal((await ready(url)).status, status)
  }
})

t.test('a gateway that drains lives, and is not ready', async t => {
  const node = await FakeNode.start(t)
  const { app, url } = await buildGateway(t, { nodes: [node] })
  await app.epd.gateway.drain()
  t.equal((await fetch(`${url}/livez`)).status, 200)
  t.match(await ready(url), { status: 503, body: { status: 'draining' } })
})
