/** The access log of `fastify-epd serve`, and its warning. */
import { join } from 'node:path'
import t, { type Test } from 'tap'
import { startCli, type CliServer } from '../helper/cli.ts'
import { post } from '../helper/fake-gateway.ts'
import { CHUNK, COMPLETION, json, modelServer, type Script } from '../helper/model-server.ts'
import { until } from '../helper/until.ts'

const CHAT = '/v1/chat/completions'
const TEXT = { model: 'm', messages: [{ role: 'user', content: 'Hello' }] }
const USAGE = { prompt_tokens: 7, completion_tokens: 3, total_tokens: 10 }

const talks: Script = (_request, response, { stream, endless }) => {
  if (stream !== true) { json(response, 200, { ...COMPLETION, usage: USAGE }); return }
  response.writeHead(200, { 'content-type': 'text/event-stream' }).write(CHUNK)
  if (endless !== true) response.end(`data: ${JSON.stringify({ object: 'chat.completion.chunk', choices: [], usage: USAGE })}\n\ndata: [DONE]\n\n`)
}

async function serve (t: Test, config: object, ...flags: string[]): Promise<CliServer> {
  const file = join(t.testdir({ 'epd.config.json': JSON.stringify(config) }), 'epd.config.json')
  const gateway = await startCli(t, ['serve', '--config', file, '--port', '0', ...flags])
  if ('nodes' in config) await until(async () => (await fetch(`${gateway.url}/readyz`)).ok, 'it is ready', 60_000, 20)
  return gateway
}

function lines (gateway: CliServer): Array<Record<string, any>> {
  return gateway.stderr().split('\n').filter(line => line.includes('"msg":"request"')).map(line => JSON.parse(line) as Record<string, any>)
}

t.test('each request has one line when it is over, however it ends', async t => {
  const node = await modelServer(t, talks)
  const gateway = await serve(t, { nodes: [{ url: node.url, adapter: 'openai' }], apiKeys: ['k'] })
  const line = async (n: number): Promise<Record<string, any>> => await until(() => lines(gateway)[n], `line ${n} is there`)
  const init = { headers: { authorization: 'Bearer k' } }
  const known = { method: 'POST', path: CHAT, model: 'm', plan: 'pd', nodes: [node.url], prompt_tokens: 7, completion_tokens: 3, outcome: 'ok', status: 200, ttft_ms: Number, duration_ms: Number, reqId: String, trace_id: /^[0-9a-f]{32}$/ }

  await (await post(gateway.url + CHAT + '?secret=1', TEXT, init)).text()
  t.match(await line(0), known, 'a whole answer')
  await (await post(gateway.url + CHAT, { ...TEXT, stream: true }, init)).text()
  t.match(await line(1), known, 'a stream')
  await post(gateway.url + CHAT, TEXT)
  const refused = await line(2)
  t.match(refused, { status: 401 }, 'no key')
  t.notOk('plan' in refused)
  await post(gateway.url + CHAT, { ...TEXT, model: 'other' }, init)
  t.match(await line(3), { status: 404, model: 'other', outcome: 'model_not_found' })
  const leaving = new AbortController()
  await post(gateway.url + CHAT, { ...TEXT, stream: true, endless: true }, { ...init, signal: leaving.signal })
  leaving.abort()
  t.match(await line(4), { status: 200, outcome: 'client_gone', nodes: [node.url] }, 'a client that leaves')
  await fetch(`${gateway.url}/v1/models`, init)
  t.match(await line(5), { method: 'GET', path: '/v1/models', status: 200 })
  await post(gateway.url + CHAT, undefined, { ...init, body: '{' })
  t.match(await line(6), { status: 400 }, 'a body that is no JSON')
  await fetch(`${gateway.url}/health`)
  t.equal(await gateway.stop(), 0)
  t.equal(lines(gateway).length, 7, 'one each, and none for probes')
  t.notMatch(gateway.stderr(), /secret|Bearer/)
  t.notMatch(gateway.stderr(), /warning/)
})

t.test('a request keeps the id that its client gave it, on all its ways', async t => {
  const ids: unknown[] = []
  const node = await modelServer(t, (request, response, body, server) => { ids.push(request.headers['x-request-id']); talks(request, response, body, server) })
  const gateway = await serve(t, { nodes: [{ url: node.url, adapter: 'openai' }] })
  const given = await post(gateway.url + CHAT, TEXT, { headers: { 'x-request-id': 'order-7:b' } })
  t.equal(given.headers.get('x-request-id'), 'order-7:b')
  t.match(String(ids[0]), /^order-7:b\./, 'the node gets it, made unique')
  t.equal((await until(() => lines(gateway)[0], 'the line is there')).reqId, 'order-7:b')
  const refused = await fetch(`${gateway.url}/nowhere`, { headers: { 'x-request-id': 'r1' } })
  t.same([refused.status, refused.headers.get('x-request-id')], [404, 'r1'], 'errors have it too')
  for (const odd of ['a b', 'x'.repeat(65), '"><']) t.match((await post(gateway.url + CHAT, TEXT, { headers: { 'x-request-id': odd } })).headers.get('x-request-id'), /^[0-9a-f-]{36}$/, odd)
  t.match((await post(gateway.url + CHAT, TEXT)).headers.get('x-request-id'), /^[0-9a-f-]{36}$/)
})

t.test('the access log can be off, and serve warns beyond loopback without keys', async t => {
  const node = await modelServer(t, talks)
  const nodes = [{ url: node.url, adapter: 'openai' }]
  const quiet = await serve(t, { nodes, server: { accessLog: false, host: '0.0.0.0' } })
  await post(quiet.url + CHAT, TEXT)
  t.equal(await quiet.stop(), 0)
  t.same(lines(quiet), [])
  t.match(quiet.stderr(), /^warning: 0\.0\.0\.0 is reached from other machines, and there are no keys/m)
  const keyed = await serve(t, { embedded: false, apiKeys: ['k'] }, '--host', '0.0.0.0')
  t.equal(await keyed.stop(), 0)
  t.notMatch(keyed.stderr(), /warning/)
})
