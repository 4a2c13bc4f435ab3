/* eslint no-template-curly-in-string: off -- variables of configuration files. */
/** Reloading a gateway that serves: by SIGHUP and POST /epd/reload, under load; draining nodes; the state file. */
import { readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { setTimeout as delay } from 'node:timers/promises'
import t, { type Test } from 'tap'
import { resolveOptions } from '../../plugin/index.ts'
import { reload } from '../../plugin/reload.ts'
import { runCli, startCli, type CliServer } from '../helper/cli.ts'
import { FakeNode, fakeAdapter } from '../helper/fake-node.ts'
import { buildGateway, chat, pictureUrl, post } from '../helper/fake-gateway.ts'
import { CHUNK, modelServer, well, type Script } from '../helper/model-server.ts'
import { until } from '../helper/until.ts'

const CHAT = '/v1/chat/completions'
const TEXT = { model: 'm', messages: [{ role: 'user', content: 'Hello' }] }

/** Answers take some time, so that reloads come in the middle of them, and clients leave the gateway the processor. */
const slowly: Script = (request, response, body, server) => {
  if (body.stream === true) response.writeHead(200, { 'content-type': 'text/event-stream' }).write(CHUNK)
  setTimeout(() => {
    if (body.stream === true) response.end(`${CHUNK}data: [DONE]\n\n`)
    else well(request, response, body, server)
  }, 30)
}

async function serve (t: Test, config: object): Promise<{ gateway: CliServer, write: (config: object | string) => void, file: string }> {
  const file = join(t.testdir({ 'epd.config.json': JSON.stringify(config) }), 'epd.config.json')
  const gateway = await startCli(t, ['serve', '--config', file, '--port', '0'])
  return { gateway, file, write: config => { writeFileSync(file, typeof config === 'string' ? config : JSON.stringify(config)) } }
}

const ready = async (url: string): Promise<unknown> => await until(async () => (await fetch(`${url}/readyz`)).ok, 'the gateway is ready', 60_000, 20)
const asked = async (url: string, key?: string): Promise<number> => (await post(url + CHAT, TEXT, key === undefined ? {} : { headers: { authorization: `Bearer ${key}` } })).status

async function reloaded (url: string): Promise<{ status: number, body: any }> {
  const answer = await fetch(`${url}/epd/reload`, { method: 'POST' })
  return { status: answer.status, body: await answer.json() }
}

t.test('a reload applies the difference and answers what changed; a broken file changes nothing and says where', async t => {
  const [one, two] = [await modelServer(t, slowly), await modelServer(t, slowly)]
  const nodes = [{ url: one.url, adapter: 'openai' }]
  const { gateway: { url, child, stderr }, write, file } = await serve(t, { nodes, apiKeys: ['old'] })
  await ready(url)
  t.same([await asked(url, 'old'), await asked(url, 'new')], [200, 401])

  t.same(await reloaded(url), { status: 200, body: { changed: [], nodes: { added: [], removed: [], changed: [] }, restart: [] } }, 'the same file changes nothing')
  write({ nodes: [{ ...nodes[0], speed: 3 }, { url: two.url, adapter: 'openai' }], apiKeys: ['new'], routing: { smallItem: 5 }, limits: { items: 3, body: 5_000 }, ui: false })
  t.same(await reloaded(url), { status: 200, body: { changed: ['apiKeys', 'limits.items', 'routing.smallItem'], nodes: { added: [two.url], removed: [], changed: [one.url] }, restart: ['limits.body', 'ui'] } })
  t.same([await asked(url, 'old'), await asked(url, 'new')], [401, 200])
  const status = await (await fetch(`${url}/nodes/status`)).json() as Record<string, { speed: number | null }>
  t.same([status[one.url]?.speed, status[two.url]?.speed], [3, null])

  for (const [text, message] of [
    ['{\n  "nodes": [],\n  "apiKeys": [5] }', `${file}:3:15: apiKeys[0] must be text that a header can have, not 5`],
    ['{\n', `${file}:2:1: not valid JSON`],
    ['{ "apiKeys": ["${EPD_NOWHERE}"] }', 'the environment variable EPD_NOWHERE is not set']
  ] as const) {
    write(text)
    const { status, body } = await reloaded(url)
    t.equal(status, 400)
    t.match(body, { error: { code: 'invalid_configuration' } })
    t.ok((body as { error: { message: string } }).error.message.includes(message), message)
  }
  child.kill('SIGHUP')
  await until(() => stderr().includes('the old one stays in force'), 'the log says so')
  t.equal(await asked(url, 'new'), 200)
  write({ nodes, apiKeys: [] })
  child.kill('SIGHUP')
  await until(async () => await asked(url) === 200, 'SIGHUP has taken the keys away')
  t.same(Object.keys(await (await fetch(`${url}/nodes/status`)).json() as object), [one.url])
})

t.test('a reload needs an operator', async t => {
  const { gateway: { url } } = await serve(t, { embedded: false, adminKey: 'k' })
  t.equal((await fetch(`${url}/epd/reload`, { method: 'POST', headers: { 'x-forwarded-for': '8.8.8.8' } })).status, 403)
  t.equal((await fetch(`${url}/epd/reload`, { method: 'POST', headers: { 'x-forwarded-for': '8.8.8.8', authorization: 'Bearer k' } })).status, 200)
})

// The whole form, a reload every second for a minute, runs with npm run test:full.
const [RELOADS, PAUSE_MS] = process.env.EPD_TEST_FULL === '1' ? [60, 1_000] : [12, 100]

t.test(`${RELOADS} reloads under load, with other nodes each time, lose no request`, { timeout: 300_000 }, async t => {
  const servers = [await modelServer(t, slowly), await modelServer(t, slowly), await modelServer(t, slowly)]
  // One node of each two sets stays: a node that was just added is not probed yet.
  const set = (i: number): object => ({ nodes: [0, 1].map(j => ({ url: servers[(i + j) % 3]!.url, adapter: 'openai', speed: 1 + i % 2 })), timeouts: { idle: 60_000 + i } })
  const { gateway: { url, child, stop }, write } = await serve(t, set(0))
  await ready(url)
  const ending = new AbortController()
  const seen = new Map<string, number>()
  const clients = Array.from({ length: 8 }, async (_, i) => {
    while (!ending.signal.aborted) {
      const stream = i % 2 === 0
      const answer = await post(url + CHAT, { ...TEXT, stream }).catch((err: unknown) => new Response(String(err), { status: 599 }))
      const text = await answer.text().catch(String)
      const whole = answer.status === 200 && (stream ? text.endsWith('data: [DONE]\n\n') && !text.includes('error') : text.includes('Hello'))
      const what = whole ? 'whole' : `${answer.status} ${text.slice(0, 200)}`
      seen.set(what, (seen.get(what) ?? 0) + 1)
    }
  })
  for (let i = 1; i <= RELOADS; i++) {
    write(set(i))
    if (i % 2 === 0) child.kill('SIGHUP')
    else t.match(await reloaded(url), { status: 200, body: { nodes: { added: { length: 1 }, removed: { length: 1 }, changed: { length: 1 } } } })
    await until(async () => {
      const status = await (await fetch(`${url}/nodes/status`)).json() as Record<string, { health: string }>
      return (set(i) as { nodes: Array<{ url: string }> }).nodes.every(node => status[node.url]?.health === 'healthy')
    }, 'the nodes of the file are in use', 20_000, 20)
    await delay(PAUSE_MS)
  }
  ending.abort()
  await Promise.all(clients)
  t.same([...seen.keys()], ['whole'])
  t.ok(servers.every(server => server.asked > 0), 'all nodes had their turn')
  t.comment(`${seen.get('whole')} requests`)
  t.equal(await stop(), 0)
})

t.test('encoders, prefill and decode nodes come and go under requests with pictures', async t => {
  const roles = ['encoder', 'encoder', 'prefill', 'prefill', 'decode', 'decode', 'hybrid'] as const
  const nodes = await Promise.all(roles.map(async role => await FakeNode.start(t, { role })))
  const { app, url } = await buildGateway(t, { nodes, options: { routing: { disaggregate: 'always' }, bypass: 'never' } })
  const ending = new AbortController()
  const seen = new Map<string, number>()
  const clients = Array.from({ length: 6 }, async (_, i) => {
    for (let n = 0; !ending.signal.aborted; n++) {
      const answer = await post(url + CHAT, chat('?', pictureUrl(i * 1_000 + n)))
      const what = answer.status === 200 ? answer.headers.get('x-epd-plan')! : `${answer.status} ${await answer.text()}`
      seen.set(what, (seen.get(what) ?? 0) + 1)
    }
  })
  for (let i = 0; i < 8; i++) {
    const without = [nodes[i % 2], nodes[2 + i % 2], nodes[4 + (i >> 1) % 2]]
    reload(app.epd.gateway, resolveOptions({ embedded: false, adapters: app.epd.gateway.options.adapters, nodes: nodes.filter(node => !without.includes(node)).map(node => node.spec), routing: { disaggregate: 'always' }, bypass: 'never' }))
    await delay(60)
    reload(app.epd.gateway, resolveOptions({ embedded: false, adapters: [fakeAdapter], nodes: nodes.map(node => node.spec), routing: { disaggregate: 'always' }, bypass: 'never' }))
    await app.epd.nodes.waitFor(snapshot => nodes.every(node => snapshot.byId.get(node.url)?.state === 'healthy'))
  }
  ending.abort()
  await Promise.all(clients)
  t.same([...seen.keys()].filter(what => /^\d/.test(what)), [])
  t.ok((seen.get('e-p-d') ?? 0) > 0)
  t.equal(app.epd.gateway.inFlight, 0)
})

t.test('a drained node gets no further request, and ends those that it has', async t => {
  const nodes = [await FakeNode.start(t), await FakeNode.start(t)]
  const { url } = await buildGateway(t, { nodes })
  const tell = async (path: string, node: string): Promise<unknown> => await (await post(`${url}/nodes/${path}`, { url: node })).json()
  let release!: () => void
  const hold = new Promise<void>(resolve => { release = resolve })
  for (const node of nodes) node.generateFaults.push({ hold })
  const pending = post(url + CHAT, chat('?'))
  const busy = await until(() => nodes.find(node => node.generations.length === 1), 'a node has the request')
  const idle = nodes.find(node => node !== busy)!
  idle.generateFaults.length = 0
  t.same(await tell('drain', busy.url + '/'), { url: busy.url, health: 'draining', unfinished: 1 })
  for (let i = 0; i < 4; i++) t.equal((await post(url + CHAT, chat('?'))).status, 200)
  t.equal(busy.generations.length, 1, 'the others went elsewhere')
  release()
  t.equal((await pending).status, 200)
  t.same(await tell('undrain', busy.url), { url: busy.url, health: 'healthy', unfinished: 0 })
  t.match(await tell('drain', idle.url), { health: 'draining' })
  t.equal((await post(url + CHAT, chat('?'))).status, 200)
  t.equal(busy.generations.length, 2, 'it takes requests again')
  t.match(await tell('drain', 'http://nowhere:1'), { error: { code: 'node_not_found', param: 'url' } })
})

t.test('nodes that register, and what is drained, outlive a restart with a state file', async t => {
  const node = await modelServer(t, slowly)
  const dir = t.testdir({ 'epd.json': JSON.stringify({ embedded: false, nodes: [{ url: 'http://127.0.0.1:1', adapter: 'openai' }], server: { port: 0, stateFile: 'state.json' } }) })
  const start = async (): Promise<CliServer> => await startCli(t, ['serve', '--config', join(dir, 'epd.json'), '--log-level', 'error'])
  const first = await start()
  t.equal((await post(`${first.url}/nodes/add`, { url: node.url, status: { role: 1, models: ['m'], speed: 2 } })).status, 200)
  await post(`${first.url}/nodes/drain`, { url: 'http://127.0.0.1:1' })
  await until(() => readFileSync(join(dir, 'state.json'), 'utf8').includes('127.0.0.1:1"'), 'it is kept')
  await first.stop('SIGKILL')
  const second = await start()
  await ready(second.url)
  const status = await (await fetch(`${second.url}/nodes/status`)).json() as Record<string, object>
  t.match(status[node.url], { speed: 2, models: ['m'] })
  t.match(JSON.parse(readFileSync(join(dir, 'state.json'), 'utf8')), { nodes: [{ url: node.url }], drained: ['http://127.0.0.1:1'] })
  await post(`${second.url}/nodes/remove`, { url: node.url })
  t.equal(await second.stop(), 0)
  t.same(JSON.parse(readFileSync(join(dir, 'state.json'), 'utf8')).nodes, [], 'what was removed does not come back')
  writeFileSync(join(dir, 'state.json'), 'rubbish')
  t.match(await runCli(['serve', '--config', join(dir, 'epd.json')]), { code: 2, stderr: /server\.stateFile: .*state\.json can't be read as one/ })
})
