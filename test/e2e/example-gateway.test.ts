/** docs/examples/gateway.ts, with a real encoder and language model engine, and an upstream of its own. */
import { createServer } from 'node:http'
import { once } from 'node:events'
import type { AddressInfo } from 'node:net'
import t from 'tap'
import { buildGateway } from '../../docs/examples/gateway.ts'
import { startCli } from '../helper/cli.ts'
import { drawScene } from '../helper/scenes.ts'
import { until } from '../helper/until.ts'

const KEY = 'customer-key'

const upstream = createServer((request, response) => {
  response.setHeader('content-type', 'application/json')
  response.end(JSON.stringify({ object: 'chat.completion', choices: [{ index: 0, message: { role: 'assistant', content: 'from the upstream' }, finish_reason: 'stop' }] }))
})
upstream.listen(0, '127.0.0.1')
await once(upstream, 'listening')
t.teardown(() => new Promise(resolve => upstream.close(resolve)))

const engines = await Promise.all(['encoder', 'hybrid'].map(role => startCli(t, ['engine', '--role', role, '--port', '0', '--sharing', '2', '--log-level', 'warn'])))
const app = await buildGateway({
  upstream: `http://127.0.0.1:${(upstream.address() as AddressInfo).port}`,
  keys: [KEY],
  requestsPerMinute: 8,
  epd: {
    bypass: 'never',
    nodes: [
      { url: engines[0]!.url, role: 'encoder', adapter: 'pytorch' },
      { url: engines[1]!.url, role: 'hybrid', adapter: 'pytorch' }
    ]
  }
})
const url = await app.listen({ port: 0, host: '127.0.0.1' })
t.teardown(() => app.close())
await until(() => app.epd.nodes.snapshot().link(engines[0]!.url, engines[1]!.url) === 'linked', 'the engines are linked')

async function chat (content: unknown, key = KEY): Promise<Response> {
  return await fetch(`${url}/v1/chat/completions`, {
    method: 'POST',
    headers: { 'content-type': 'application/json', authorization: `Bearer ${key}` },
    body: JSON.stringify({ model: 'tiny-internvl', temperature: 0, messages: [{ role: 'user', content }] })
  })
}

await t.test('a picture question goes E -> PD', async t => {
  const response = await chat([{ type: 'image_url', image_url: { url: await drawScene(5) } }, { type: 'text', text: 'How many shapes are there?' }])
  t.equal(response.status, 200)
  t.equal(response.headers.get('x-epd-plan'), 'e-pd')
  t.match((await response.json() as { model: string }).model, 'tiny-internvl')
})

await t.test('a text question goes to the upstream as before', async t => {
  const response = await chat('Hello')
  t.match(await response.json(), { choices: [{ message: { content: 'from the upstream' } }] })
})

await t.test('the gateway\'s own authentication guards both', async t => {
  t.equal((await chat('Hello', 'wrong')).status, 401)
  t.equal((await chat([{ type: 'image_url', image_url: { url: await drawScene(5) } }], 'wrong')).status, 401)
})

await t.test('the gateway\'s own rate limit counts both', async t => {
  const statuses: number[] = []
  for (let i = 0; i < 8; i++) statuses.push((await chat('Hello')).status)
  t.ok(statuses.includes(429))
  t.equal((await chat([{ type: 'image_url', image_url: { url: await drawScene(5) } }])).status, 429)
})
