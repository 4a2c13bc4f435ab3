/** `fastify-epd nodes` against a gateway, and against what is none. */
import { once } from 'node:events'
import { createServer } from 'node:http'
import type { AddressInfo } from 'node:net'
import t from 'tap'
import { nodesOf } from '../../plugin/cli/node-status.ts'
import { runCli, runCommand } from '../helper/cli.ts'
import { FakeNode } from '../helper/fake-node.ts'
import { buildGateway, chat, post, settled } from '../helper/fake-gateway.ts'
import { COMPLETION, gatewayFor, json, modelServer } from '../helper/model-server.ts'
import { until } from '../helper/until.ts'

t.test('nodes are listed with their state, breakers and last error', async t => {
  const [encoder, one, two] = await Promise.all([FakeNode.start(t, { role: 'encoder' }), FakeNode.start(t), FakeNode.start(t)])
  const { app, url } = await buildGateway(t, { nodes: [encoder, one, two] })
  one.generateFaults.push('failed')
  t.equal((await post(`${url}/v1/chat/completions`, chat('Hello'))).status, 200)
  await two.close()
  await app.epd.nodes.ask(two.url)
  await until(() => app.epd.nodes.get(two.url)?.state === 'unhealthy', 'the node is unhealthy')
  const [{ stdout, code }, machine] = await Promise.all([runCli(['nodes', '--url', url]), runCommand(['nodes', '--url', url, '--json'])])
  t.equal(code, 0)
  const line = (node: FakeNode): string => stdout.split('\n').find(line => line.startsWith(node.url))!
  t.match(line(encoder), /encoder +fake +vlm +healthy +closed +0 +0/)
  t.match(line(one), /hybrid .* healthy .*scripted failed \(\d+ s ago\)/)
  t.match(line(two), /hybrid .* unhealthy .*refuses connections/)
  t.match(JSON.parse(machine.stdout), [{ url: encoder.url, role: 'encoder', lastError: null }, { url: one.url, lastError: /scripted failed/ }, { url: two.url, health: 'unhealthy' }])
})

t.test('a node is added, drained, taken back and removed', async t => {
  const server = await modelServer(t, (_request, response) => { json(response, 200, COMPLETION) })
  const gateway = await gatewayFor(t, [])
  const nodes = async (...args: string[]): Promise<{ code: number | null, stdout: string, stderr: string }> => await runCommand(['nodes', ...args, '--url', gateway.url])
  t.match(await nodes(), { code: 0, stdout: /the gateway has no nodes/ })
  t.match(await nodes('add', server.url + '/', '--role', 'hybrid', '--speed', '2'), { code: 0, stdout: /^added\n[^]*hybrid +openai +m +healthy/ })
  t.match(gateway.app.epd.nodes.snapshot().nodes, [{ id: server.url, speed: 2 }])
  t.match(await nodes('drain', server.url, '--wait'), { code: 0, stdout: /draining +0 in flight/ })
  t.equal(gateway.app.epd.nodes.get(server.url)?.state, 'draining')
  t.match(await nodes('undrain', server.url), { code: 0, stdout: /healthy/ })
  t.match(await nodes('remove', server.url), { code: 0, stdout: `removed ${server.url}\n` })
  t.match(await nodes('remove', server.url), { code: 1, stdout: '', stderr: /the gateway has no node http.*lists those that it has\n$/ })
  t.match(await nodes('drain', server.url), { code: 1, stdout: '', stderr: /answered 404/ })
})

t.test('drain --wait returns when the node has nothing left to do', async t => {
  const node = await FakeNode.start(t)
  let release = (): void => {}
  node.generateFaults.push({ hold: new Promise(resolve => { release = resolve }) })
  const { url, app } = await buildGateway(t, { nodes: [node] })
  const answer = post(`${url}/v1/chat/completions`, chat('Hello'))
  await until(() => app.epd.nodes.get(node.url)?.load.requests === 1, 'it is in flight')
  let ended = false
  const drained = runCommand(['nodes', 'drain', node.url, '--wait', '--url', url]).finally(() => { ended = true })
  await until(() => app.epd.nodes.get(node.url)?.state === 'draining', 'it is drained', 30_000)
  t.notOk(ended)
  release()
  t.equal((await answer).status, 200)
  t.match(await drained, { code: 0, stdout: /0 in flight/ })
  await settled(app.epd.nodes, [])
})

t.test('the admin key is sent, and asked for where it is missing', async t => {
  const server = createServer(({ headers: { authorization } }, response) => {
    if (authorization === 'Bearer admin-secret') json(response, 200, {})
    else json(response, 403, { error: { message: 'Not from here.', code: 'forbidden' } })
  }).listen(0, '127.0.0.1')
  t.teardown(() => server.close())
  await once(server, 'listening')
  const url = `http://127.0.0.1:${(server.address() as AddressInfo).port}`
  const [flag, variable, none] = await Promise.all([
    runCommand(['nodes', '--url', url, '--admin-key', 'admin-secret']), runCommand(['nodes', '--url', url], { env: { EPD_ADMIN_KEY: 'admin-secret' } }), runCommand(['nodes', '--url', url])
  ])
  for (const one of [flag, variable]) t.match(one, { code: 0, stdout: /no nodes/ })
  t.match(none, { code: 1, stdout: '', stderr: /^fastify-epd: the gateway answered 403: Not from here\. \(--admin-key KEY or the environment variable EPD_ADMIN_KEY gives the key\)\n$/ })
})

t.test('what is no gateway, and what is no node, is one line', async t => {
  const other = await modelServer(t, (_request, response) => { json(response, 200, '\x1b[2Jadded') })
  const cases: ReadonlyArray<readonly [args: string[], code: number, stderr: RegExp]> = [
    [['dance'], 2, /the action must be one of list, add, remove, drain, undrain, not 'dance'/],
    [['--admin-key', 'a\nb'], 2, /--admin-key has characters that a header can't have/],
    [['--url', 'http://a/?b'], 2, /--url must be a base URL, without \? and #/],
    [['--url', 'http://u:p@a'], 2, /--url must not hold a password/],
    [['add', 'n1:8000'], 2, /the node must be an http or https URL/],
    [['drain', 'http://n', '--role', 'encoder'], 2, /--role, --model and --speed are for add/],
    [['--url', other.url], 1, /answered 404/],
    [['add', 'http://n', '--url', other.url], 1, /the gateway did not add http:\/\/n: {2}\[2Jadded/]
  ]
  await Promise.all(cases.map(async ([args, code, stderr]) => { t.match(await runCommand(['nodes', ...args]), { code, stdout: '', stderr }, args.join(' ')) }))
})

t.test('an answer without end is given up, and JSON steers no terminal either', async t => {
  const model = 'm\u009b2J\u202e\x1b'
  const server = createServer(({ url }, response) => {
    response.on('error', () => {})
    if (url!.startsWith('/endless')) {
      const more = (): void => { while (!response.destroyed && response.write(' '.repeat(1_000_000))) { /* until it is full */ } }
      response.on('drain', more)
      more()
    } else if (url!.endsWith('/nodes/status')) json(response, 200, { 'http://n': { role: 1, models: [model], unfinished: 0, latency: [], speed: 1, health: 'healthy', source: 'configuration', adapter: 'openai', backend: null, epoch: null, vision: null, produces: [], accepts: [], fingerprint: null, standalone: false, vision_tokens: 0, vision_rate: null, notes: [], breakers: {}, links: {} } })
    else json(response, 200, { traces: [] })
  }).listen(0, '127.0.0.1')
  t.teardown(() => { server.closeAllConnections(); server.close() })
  await once(server, 'listening')
  const url = `http://127.0.0.1:${(server.address() as AddressInfo).port}`
  t.match(await runCommand(['nodes', '--url', `${url}/endless`]), { code: 1, stdout: '', stderr: /^fastify-epd: .*(is not a fastify-epd gateway: its answer to \/nodes\/status has no end|no answer within 5 s.*)\n$/ })
  const { stdout, code } = await runCommand(['nodes', '--url', url, '--json'])
  t.equal(code, 0)
  for (const char of ['\u009b', '\u202e', '\x1b']) t.notOk(stdout.includes(char))
  t.match(JSON.parse(stdout), [{ models: [model] }])
})

t.test('other answers to /nodes/status are told from a gateway\'s', async t => {
  let answer: unknown
  const server = createServer((_request, response) => { response.end(typeof answer === 'string' ? answer : JSON.stringify(answer)) }).listen(0, '127.0.0.1')
  t.teardown(() => server.close())
  await once(server, 'listening')
  const url = `http://127.0.0.1:${(server.address() as AddressInfo).port}`
  for (answer of ['<html>', '', [], null, 7, { 'http://n': null }, { 'http://n': 5 }, { 'http://n': { role: 1, health: 'healthy' } }, { 'http://n': { health: 'healthy', models: [], breakers: null } }]) {
    await t.rejects(nodesOf({ url }), { message: /is not a fastify-epd gateway/ }, JSON.stringify(answer))
  }
  answer = {}
  t.same(await nodesOf({ url }), [])
})
