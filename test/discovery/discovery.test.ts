/** Nodes that are found: by a real name server, and by a fake of Kubernetes' API server that lists and watches; `npm run test:kubernetes` asks a real one. */
import { once } from 'node:events'
import { writeFileSync } from 'node:fs'
import { createServer, type Server } from 'node:http'
import type { AddressInfo } from 'node:net'
import { join } from 'node:path'
import t, { type Test } from 'tap'
import { names } from '../../plugin/discovery/dns.ts'
import { resolveOptions, type EpdOptions } from '../../plugin/index.ts'
import { reload } from '../../plugin/reload.ts'
import { runCli, startCli } from '../helper/cli.ts'
import { startDns } from '../helper/dns-server.ts'
import { buildGateway, post, type FakeGateway } from '../helper/fake-gateway.ts'
import { FakeKubernetes } from '../helper/fake-kubernetes.ts'
import { COMPLETION, json } from '../helper/model-server.ts'
import { until } from '../helper/until.ts'

const CHAT = '/v1/chat/completions'
const TEXT = { model: 'm', messages: [{ role: 'user', content: 'Hello' }] }

interface Servers {
  readonly port: number
  /** Requests that wait for this. */
  hold: Promise<void> | undefined
  held: number
}

/** A model server at each of these addresses, all on one port. */
async function servers (t: Test, ...addresses: readonly string[]): Promise<Servers> {
  const state: Servers = { port: 0, hold: undefined, held: 0 }
  let port = 0
  for (const address of addresses) {
    const server: Server = createServer((request, response) => {
      if (request.url === '/v1/models') { json(response, 200, { object: 'list', data: [{ id: 'm', object: 'model' }] }); return }
      if (request.method === 'GET') { response.writeHead(request.url === '/health' ? 200 : 404).end(); return }
      const answer = (): void => { json(response, 200, COMPLETION) }
      if (state.hold === undefined) { request.resume().on('end', answer); return }
      state.held++
      state.hold.then(() => { request.resume().on('end', answer) })
    })
    t.teardown(() => { server.closeAllConnections(); server.close() })
    server.listen(port, address)
    await once(server, 'listening')
    port = (server.address() as AddressInfo).port
  }
  return Object.assign(state, { port })
}

const statusOf = async (url: string): Promise<Record<string, { health: string, source: string, role: number }>> => await (await fetch(`${url}/nodes/status`)).json() as never

async function has (url: string, ...nodes: readonly string[]): Promise<void> {
  await until(async () => String(Object.entries(await statusOf(url)).filter(([, { health }]) => health === 'healthy').map(([id]) => id).sort()) === String([...nodes].sort()), `the nodes are ${String(nodes)}`, 60_000, 20)
}

const gateway = async (t: Test, discover: NonNullable<EpdOptions['discover']>, options: EpdOptions = {}): Promise<FakeGateway> => await buildGateway(t, { options: { discover, ...options } })

t.test('addresses of a name are nodes, that come and go with it', async t => {
  const { port } = await servers(t, '127.0.0.2', '127.0.0.3', '::1')
  const dns = await startDns(t)
  dns.zones.set('llm.vlm.svc', { addresses: ['127.0.0.2', '127.0.0.3', '::1'] })
  const { url } = await gateway(t, [{ dns: 'llm.vlm.svc', port, server: dns.address, adapter: 'openai', speed: 2 }])
  const node = (host: string): string => `http://${host}:${port}`
  await has(url, node('127.0.0.2'), node('127.0.0.3'), node('[::1]'))
  t.match((await statusOf(url))[node('127.0.0.2')], { source: 'dns llm.vlm.svc', speed: 2, adapter: 'openai' })
  t.equal((await post(url + CHAT, TEXT)).status, 200)

  dns.zones.set('llm.vlm.svc', { addresses: ['127.0.0.3'] })
  await has(url, node('127.0.0.3'))
  dns.failing = true
  const before = dns.asked.get('llm.vlm.svc')!
  await until(() => dns.asked.get('llm.vlm.svc')! > before, 'it was asked and failed', 60_000, 20)
  await has(url, node('127.0.0.3'))
  dns.failing = false
  dns.zones.delete('llm.vlm.svc')
  const then = dns.asked.get('llm.vlm.svc')!
  await until(() => dns.asked.get('llm.vlm.svc')! > then, 'the name is not there', 60_000, 20)
  await has(url, node('127.0.0.3'))
  dns.zones.set('llm.vlm.svc', { addresses: ['127.0.0.2'] })
  await has(url, node('127.0.0.2'))
})

t.test('services of a name (SRV) are nodes with ports of their own', async t => {
  const [one, two, three] = [await servers(t, '127.0.0.2'), await servers(t, '127.0.0.3'), await servers(t, '127.0.0.4')]
  const dns = await startDns(t)
  dns.zones.set('a.pod', { addresses: ['127.0.0.2'] }).set('b.pod', { addresses: ['127.0.0.3'] })
  dns.zones.set('_http._tcp.llm', { services: [{ target: 'a.pod', port: one.port }, { target: 'b.pod', port: two.port }] })
  const { url } = await gateway(t, [{ dns: '_http._tcp.llm', server: dns.address, adapter: 'openai' }])
  await has(url, `http://127.0.0.2:${one.port}`, `http://127.0.0.3:${two.port}`)

  dns.zones.delete('a.pod')
  dns.zones.set('c.pod', { addresses: ['127.0.0.4'] })
  const [b, c] = [{ target: 'b.pod', port: two.port }, { target: 'c.pod', port: three.port }]
  dns.zones.set('_http._tcp.llm', { services: [{ target: 'a.pod', port: one.port }, { target: 'b.pod', port: 0 }, b, c] })
  await has(url, `http://127.0.0.3:${two.port}`, `http://127.0.0.4:${three.port}`)
  dns.zones.set('_http._tcp.llm', { services: [{ target: '.', port: 0 }] })
  const before = dns.asked.get('_http._tcp.llm')!
  await until(() => dns.asked.get('_http._tcp.llm')! > before + 1, 'it says that there is none', 60_000, 20)
  await has(url, `http://127.0.0.3:${two.port}`, `http://127.0.0.4:${three.port}`)
  dns.zones.set('_http._tcp.llm', { services: [b] })
  await has(url, `http://127.0.0.3:${two.port}`)
})

t.test('an answer counts for its time to live', async t => {
  const { port } = await servers(t, '127.0.0.2')
  const dns = await startDns(t)
  dns.zones.set('short', { addresses: ['127.0.0.2'], ttl: 1 }).set('long', { addresses: ['127.0.0.2'], ttl: 3_600 })
  await gateway(t, [{ dns: 'short', port, server: dns.address }, { dns: 'long', port, server: dns.address }])
  await until(() => (dns.asked.get('short') ?? 0) >= 6, 'the one is asked for again and again', 60_000, 20)
  t.equal(dns.asked.get('long'), 2, 'the other one was once, for A and AAAA')
})

t.test('a node that leaves ends what it has; reload and discovery leave each other\'s nodes alone', async t => {
  const all = await servers(t, '127.0.0.2', '127.0.0.3', '127.0.0.4')
  const node = (n: number): string => `http://127.0.0.${n}:${all.port}`
  const dns = await startDns(t)
  dns.zones.set('llm', { addresses: ['127.0.0.2', '127.0.0.4'] })
  const discover = [{ dns: 'llm', port: all.port, server: dns.address, adapter: 'openai' }]
  const { app, url } = await gateway(t, discover, { nodes: [{ url: node(4), adapter: 'openai' }] })
  await has(url, node(2), node(4))
  t.match(await statusOf(url), { [node(2)]: { source: 'dns llm' }, [node(4)]: { source: 'configuration' } })

  const again = (nodes: EpdOptions['nodes']): unknown => reload(app.epd.gateway, resolveOptions({ embedded: false, adapters: app.epd.gateway.options.adapters, discover, nodes, routing: { policy: 'least-tokens' } }))
  again([{ url: node(3), adapter: 'openai' }])
  await has(url, node(2), node(3), node(4))
  t.match(await statusOf(url), { [node(3)]: { source: 'configuration' }, [node(4)]: { source: 'dns llm' } }, 'what the file no longer has is its source\'s')
  await post(`${url}/nodes/add`, { url: node(1) })
  t.match(await statusOf(url), { [node(1)]: { source: 'registration' } })
  await post(`${url}/nodes/remove`, { url: node(1) })

  again([])
  await post(`${url}/nodes/drain`, { url: node(4) })
  await has(url, node(2))
  let letGo!: () => void
  all.hold = new Promise(resolve => { letGo = resolve })
  const pending = post(url + CHAT, TEXT)
  await until(() => all.held === 1, 'it has a request')
  dns.zones.set('llm', { addresses: ['127.0.0.4'] })
  await until(async () => (await statusOf(url))[node(2)]?.health === 'draining', 'it takes no more', 60_000, 20)
  t.match(await (await post(`${url}/nodes/undrain`, { url: node(4) })).json(), { health: 'healthy' })
  all.hold = undefined
  t.equal((await post(url + CHAT, TEXT)).status, 200, 'the others do')
  letGo()
  t.equal((await pending).status, 200)
  await until(async () => (await statusOf(url))[node(2)] === undefined, 'it is gone', 60_000, 20)
})

t.test('pods that are ready are nodes: list, watch, resumed watches, 410 Gone', async t => {
  const { port } = await servers(t, '127.0.0.2', '127.0.0.3', '127.0.0.4')
  const node = (n: number): string => `http://127.0.0.${n}:${port}`
  const kubernetes = await FakeKubernetes.start(t)
  const labels = { app: 'vllm' }
  kubernetes.set('a', { ip: '127.0.0.2', labels })
  kubernetes.set('b', { ip: '127.0.0.3', labels, ready: false })
  kubernetes.set('other', { ip: '127.0.0.9', labels: { app: 'other' } })
  const { url } = await gateway(t, [{ kubernetes: { selector: 'app=vllm', port, roleLabel: 'role', kubeconfig: kubernetes.kubeconfig }, adapter: 'openai' }])
  await has(url, node(2))
  t.match(await statusOf(url), { [node(2)]: { source: 'kubernetes app=vllm', role: 1 } })
  kubernetes.set('b', { ip: '127.0.0.3', labels })
  await has(url, node(2), node(3))
  kubernetes.set('a', { ip: '127.0.0.2', labels, ending: true })
  await has(url, node(3))
  kubernetes.set('c', { ip: '127.0.0.4', labels: { ...labels, role: 'encoder' } })
  await until(async () => (await statusOf(url))[node(4)]?.role === 4, 'its label says the role', 60_000, 20)
  kubernetes.delete('c')
  await until(async () => (await statusOf(url))[node(4)] === undefined, 'a pod that is gone is no node', 60_000, 20)

  const [lists, watches] = [kubernetes.lists.length, kubernetes.watches.length]
  kubernetes.bookmark()
  kubernetes.endWatches()
  kubernetes.delete('a')
  kubernetes.set('a', { ip: '127.0.0.2', labels })
  await has(url, node(2), node(3))
  t.equal(kubernetes.lists.length, lists, 'a watch goes on where it was')
  t.ok(kubernetes.watches.length > watches)

  kubernetes.endWatches()
  kubernetes.forget()
  kubernetes.delete('b')
  await has(url, node(2))
  t.ok(kubernetes.lists.length > lists, 'after 410 it lists')
  t.ok(kubernetes.lists.every(selector => selector === 'app=vllm'))
})

t.test('an API server that refuses costs no node', async t => {
  const { port } = await servers(t, '127.0.0.2', '127.0.0.3')
  const kubernetes = await FakeKubernetes.start(t)
  const labels = { app: 'vllm' }
  kubernetes.set('a', { ip: '127.0.0.2', labels })
  const { url } = await gateway(t, [{ kubernetes: { selector: 'app=vllm', port, kubeconfig: kubernetes.kubeconfig }, adapter: 'openai' }])
  await has(url, `http://127.0.0.2:${port}`)
  kubernetes.refusing = true
  kubernetes.forget()
  kubernetes.endWatches()
  kubernetes.set('b', { ip: '127.0.0.3', labels })
  await until(() => kubernetes.refused > 0, 'it has refused', 60_000, 20)
  await has(url, `http://127.0.0.2:${port}`)
  kubernetes.refusing = false
  await has(url, `http://127.0.0.2:${port}`, `http://127.0.0.3:${port}`)
})

t.test('with several workers only the primary asks', async t => {
  const { port } = await servers(t, '127.0.0.2')
  const dns = await startDns(t)
  dns.zones.set('llm', { addresses: ['127.0.0.2'], ttl: 3_600 })
  const file = join(t.testdir({}), 'epd.json')
  writeFileSync(file, JSON.stringify({ discover: [{ dns: 'llm', port, server: dns.address, adapter: 'openai' }], server: { port: 0, workers: 2, stateFile: 'state.json' } }))
  const { url, stop } = await startCli(t, ['serve', '--config', file, '--log-level', 'error'])
  await until(async () => (await post(url + CHAT, TEXT)).status === 200 && (await post(url + CHAT, TEXT)).status === 200, 'both have the node', 60_000, 20)
  t.equal(dns.asked.get('llm'), 2, 'for A and AAAA')
  t.equal(await stop(), 0)
})

t.test('a wrong source is refused by its name', async t => {
  const refused = (source: object): string => {
    try {
      resolveOptions({ discover: [source] })
      return 'taken'
    } catch (err) {
      return (err as Error).message
    }
  }
  t.match(refused({ dns: 'a', port: 0 }), /discover\[0\]\.port must be >= 1, not 0/)
  t.match(refused({ dns: 'a', port: 1, adapter: 'x' }), /discover\[0\]\.adapter must be one of .*, not "x"/)
  t.match(refused({ dns: 'a', server: 'ns.example.com' }), /discover\[0\]\.server must be an address such as/)
  for (const server of ['300.1.1.1', '10.0.0.1:0', '10.0.0.1:99999', '[::zz]:53', '[1::2::3]']) t.match(refused({ dns: 'a', server }), /discover\[0\]\.server must be an/, server)
  for (const server of ['10.0.0.1', '10.0.0.1:5353', '[::1]', '[::1]:53']) t.equal(refused({ dns: 'a', server }), 'taken', server)
  t.match(refused({ kubernetes: { port: 1 } }), /discover\[0\]\.kubernetes\.selector is missing/)
  t.match(refused({ consul: 'a' }), /unknown option discover\[0\]\.consul/)
  t.match(refused({ port: 1 }), /discover\[0\] must have one of dns and kubernetes, not neither/)
  t.match(refused({ dns: 'a', kubernetes: { selector: 'a', port: 1 } }), /not both/)
  t.match(refused({ port: 1, kubernetes: { selector: 'a', port: 1 } }), /discover\[0\]\.port must stand beside dns/)
  t.equal(refused({ dns: 'a' }), 'taken')
  t.equal(resolveOptions({ discover: [{ dns: 'a' }] }).embedded, undefined, 'no engines are started beside')
  await t.rejects(gateway(t, [{ kubernetes: { selector: 'a', port: 1, kubeconfig: '/nowhere' } }]), { message: /discover: can't use the kubeconfig \/nowhere/ })
  const file = join(t.testdir({ 'epd.json': '{ "discover": [{ "dns": 5 }] }' }), 'epd.json')
  t.match(await runCli(['serve', '--check', '--config', file]), { code: 2, stderr: /epd\.json:1:25: discover\[0\]\.dns must be a name such as encoder\.vlm\.svc, not 5/ })
})

t.test('short names are completed as the system does', async t => {
  const file = join(t.testdir({ 'resolv.conf': 'nameserver 10.0.0.10\nsearch vlm.svc.cluster.local svc.cluster.local cluster.local\noptions ndots:5\n' }), 'resolv.conf')
  t.same(names('encoder.vlm.svc', file), ['encoder.vlm.svc.vlm.svc.cluster.local', 'encoder.vlm.svc.svc.cluster.local', 'encoder.vlm.svc.cluster.local', 'encoder.vlm.svc'])
  t.same(names('encoder.vlm.svc.cluster.local.', file), ['encoder.vlm.svc.cluster.local.'])
  t.same(names('a.b', '/nowhere'), ['a.b'])
})
