import { createServer } from 'node:http'
import { once } from 'node:events'
import type { AddressInfo } from 'node:net'
import t from 'tap'
import { AdapterError, type Adapter, type AdapterNode, type Link, type NodeInfo, type Role } from '../../adapters/adapter.ts'
import { openai } from '../../adapters/index.ts'
import { Registry, type RegistryOptions, type RegistrySnapshot } from '../../plugin/registry/index.ts'
import { Breaker } from '../../plugin/registry/load.ts'
import { dialUrl, isUnspecified } from '../../plugin/registry/node-url.ts'
import { dispatcherFor, silent } from '../helper/adapter-call.ts'
import { FakeLmdeploy, type FakeLmdeployOptions } from '../helper/fake-lmdeploy.ts'
import { until } from '../helper/until.ts'

type T = Pick<typeof t, 'teardown'>
const FAST: Partial<RegistryOptions> = { probeInterval: 30, probeBackoff: 20, probeBackoffMax: 60 }

function registryFor (t: T, options: Partial<RegistryOptions> = {}): Registry {
  const dispatcher = dispatcherFor(t)
  const registry = new Registry({ dispatcher, log: silent, ...FAST, ...options })
  // The registry's timers keep no process alive; a gateway's server does.
  const alive = setInterval(() => {}, 1000)
  t.teardown(async () => {
    clearInterval(alive)
    await registry.close()
  })
  return registry
}

async function lmdeploy (t: T, options: FakeLmdeployOptions = {}): Promise<FakeLmdeploy> {
  const fake = await FakeLmdeploy.start(options)
  t.teardown(async () => { await fake.close() })
  return fake
}

const states = (...wanted: string[]) => (snapshot: RegistrySnapshot): boolean => snapshot.nodes.map(node => node.state).join() === wanted.join()
const refusal = async (promise: Promise<unknown>): Promise<unknown> => await promise.then(() => undefined, (error: unknown) => error)
const unavailable = (node: string, code = 'ECONNREFUSED'): AdapterError => new AdapterError('UNAVAILABLE', 'gone', { node, cause: Object.assign(new Error(code), { code }) })

const FORMATS: Readonly<Record<Role, Pick<NodeInfo, 'produces' | 'accepts'>>> = {
  encoder: { produces: ['features:x'], accepts: [] },
  hybrid: { produces: ['kv:x'], accepts: ['features:x'] },
  prefill: { produces: ['kv:x'], accepts: ['features:x'] },
  decode: { produces: [], accepts: ['kv:x'] }
}

/** Nodes that exist in this map alone. */
class World {
  readonly infos = new Map<string, Partial<NodeInfo> | Error>()
  readonly linking: string[] = []
  readonly unlinked: string[] = []
  probes = 0
  onLink: (a: AdapterNode, b: AdapterNode) => Promise<void> = async () => {}

  readonly adapter: Adapter = {
    ...openai,
    name: 'world',
    probe: async node => {
      this.probes++
      const info = this.infos.get(node.id)
      if (info === undefined) throw unavailable(node.id)
      if (info instanceof Error) throw info
      return { status: 'healthy', models: ['m'], role: node.role, backend: 'world', epoch: 1, fingerprint: 'f', vision: 'full', ...FORMATS[node.role], ...info }
    },
    link: async (a, b): Promise<Link> => {
      this.linking.push(`${a.id}>${b.id}`)
      const epochs = [a.info?.epoch, b.info?.epoch] as const
      await this.onLink(a, b)
      return { from: a.id, to: b.id, transport: 'world', epochs }
    },
    unlink: async (a, b) => { this.unlinked.push(`${a.id}>${b.id}`) }
  }
}

const E = 'http://e:1'
const E2 = 'http://e:2'
const PD = 'http://pd:1'
const P = 'http://p:1'
const D = 'http://d:1'

function worldWith (t: T, options: Partial<RegistryOptions> = {}): { world: World, registry: Registry, add: (url: string, role: Role, info?: Partial<NodeInfo>) => void } {
  const world = new World()
  const registry = registryFor(t, { adapters: [world.adapter], ...options })
  return {
    world,
    registry,
    add: (url, role, info = {}) => {
      world.infos.set(url, info)
      registry.add({ url, role, adapter: 'world' })
    }
  }
}

/** A gateway's /nodes/add, reduced to the minimum. */
async function nodesAdd (t: T, registry: Registry): Promise<string> {
  const server = createServer((request, response) => {
    const chunks: Buffer[] = []
    request.on('data', (chunk: Buffer) => chunks.push(chunk))
    request.on('end', () => {
      const { url, status } = JSON.parse(Buffer.concat(chunks).toString()) as { url: string, status: { models: string[] } }
      registry.add({ url, role: 'hybrid', models: status.models }, { peer: request.socket.remoteAddress })
      response.end('"Added successfully"')
    })
  }).listen(0, '127.0.0.1')
  t.teardown(() => { server.closeAllConnections(); server.close() })
  await once(server, 'listening')
  return `http://127.0.0.1:${(server.address() as AddressInfo).port}`
}

t.test('lmdeploy registers before it listens: accepted at once, healthy when it answers, kept when it vanishes, healthy when it returns', async t => {
  const registry = registryFor(t)
  const proxyUrl = await nodesAdd(t, registry)
  const fake = await lmdeploy(t, { proxyUrl, model: 'm' })
  await registry.waitFor(states('healthy'))
  const node = registry.get(fake.url)!
  t.match(node, { id: fake.url, role: 'hybrid', models: ['m'], adapter: { name: 'pytorch' }, info: { vision: 'full' } })
  t.equal(registry.snapshot(), registry.snapshot(), 'the snapshot is built once')
  await fake.vanish()
  await registry.waitFor(states('unhealthy'))
  t.same(registry.snapshot().models, [])
  t.match(registry.status()[fake.url], { role: 1, models: ['m'], unfinished: 0, latency: [], speed: null, health: 'unhealthy', adapter: 'pytorch', notes: [/refuses connections/] })
  t.same(Object.keys(registry.status()[fake.url]!).slice(0, 5), ['role', 'models', 'unfinished', 'latency', 'speed'])
  await fake.comeBack()
  await registry.waitFor(states('healthy'))
  t.same(registry.snapshot().models, ['m'])
  t.match(registry.status()[fake.url], { health: 'healthy', backend: 'lmdeploy pytorch', notes: [] })
})

t.test('a registration without an adapter finds its own, again after a restart as another backend', async t => {
  const registry = registryFor(t)
  const turbo = await lmdeploy(t, { backend: 'turbomind', model: 't' })
  registry.add({ url: turbo.url })
  await registry.waitFor(states('healthy'))
  t.equal(registry.get(turbo.url)!.adapter.name, 'turbomind')
  await turbo.close()
  await registry.waitFor(states('unhealthy'))
  await lmdeploy(t, { port: turbo.port, model: 't' })
  await registry.waitFor(states('healthy'))
  t.equal(registry.get(turbo.url)!.adapter.name, 'pytorch')
})

t.test('a node registered as 0.0.0.0 keeps that id, is dialled where it registered from, and is not linked', async t => {
  const registry = registryFor(t)
  const fake = await lmdeploy(t, { serverName: '0.0.0.0' })
  registry.add({ url: fake.url, models: [fake.model] }, { peer: '::ffff:127.0.0.1' })
  await registry.waitFor(states('healthy'))
  t.match(registry.get(fake.url), { id: `http://0.0.0.0:${fake.port}`, url: `http://127.0.0.1:${fake.port}` })
  t.equal(dialUrl('http://0.0.0.0:1/base', '10.0.0.7'), 'http://10.0.0.7:1/base')
  t.equal(dialUrl('http://[::]:1', 'fe80::1%eth0'), 'http://[fe80::1]:1')
  t.equal(dialUrl('http://0.0.0.0:1', undefined), 'http://127.0.0.1:1')
  t.equal(dialUrl('http://h:1/', '10.0.0.7'), 'http://h:1/')
  t.ok(isUnspecified('https://[::]:1'))

  const { world, registry: other, add } = worldWith(t)
  add('http://0.0.0.0:1', 'encoder')
  add(PD, 'hybrid')
  await other.waitFor(snapshot => snapshot.link('http://0.0.0.0:1', PD) === 'refused')
  t.match(other.status()[PD]!.links, { 'http://0.0.0.0:1': { reason: /no address another engine can dial/ } })
  t.same(world.linking, [])
})

t.test('registering again changes nothing when nothing is new, and updates when something is', async t => {
  const { world, registry, add } = worldWith(t)
  add(PD, 'hybrid', { models: ['probed'] })
  await registry.waitFor(states('healthy'))
  const { version } = registry.snapshot()
  const first = registry.add({ url: PD, role: 'hybrid' })
  t.equal(first.changed, false)
  t.equal(registry.snapshot().version, version)
  t.equal(registry.get(PD)!.state, 'healthy')
  t.same(registry.get(PD)!.models, ['probed'])
  const second = registry.add({ url: PD, role: 'hybrid', models: ['given'], speed: 2 })
  t.equal(second.changed, true)
  t.equal(second.token, first.token)
  t.match(registry.get(PD), { state: 'healthy', models: ['given'], speed: 2 })
  t.equal(registry.add({ url: PD, role: 'hybrid', models: ['given'], speed: 2 }).changed, false)

  world.infos.set(E, {})
  registry.add({ url: E, role: 'encoder', adapter: 'world', models: ['fixed'], apiKey: 'k' }, { configured: true })
  t.equal(registry.add({ url: E, role: 'hybrid', models: ['other'] }).changed, false, 'the configuration stands')
  t.match(registry.get(E), { models: ['fixed'], apiKey: 'k', role: 'encoder' })
  registry.add({ url: E, role: 'encoder', models: ['new'] }, { configured: true })
  t.same(registry.get(E)!.models, ['new'])
})

t.test('an invalid node is refused at once', async t => {
  const registry = registryFor(t)
  for (const url of ['', 'nonsense', 'ftp://h', 'http://u:p@h', 'http://h?x=1', 'http://h\n', 'http://h/模型', 'http://h /']) t.throws(() => registry.add({ url }), TypeError, url)
  t.throws(() => registry.add({ url: 'http://h', adapter: 'nope' }), /unknown adapter/)
  t.throws(() => new Registry({ dispatcher: dispatcherFor(t), log: silent, adapters: [{ ...openai, name: '' }] }), /name/)
  t.same(registry.snapshot().nodes, [])
  t.equal(registry.remove('http://h'), false)
})

t.test('a slow or failing probe must fail twice, a refused connection once', async t => {
  const { world, registry, add } = worldWith(t)
  add(PD, 'hybrid')
  await registry.waitFor(states('healthy'))
  const seen: string[] = []
  registry.on('change', snapshot => { seen.push(snapshot.nodes[0]!.state) })
  const before = world.probes
  world.infos.set(PD, unavailable(PD, 'ETIMEDOUT'))
  await registry.waitFor(states('unhealthy'))
  t.ok(world.probes >= before + 2)
  world.infos.set(PD, {})
  await registry.waitFor(states('healthy'))
  const again = world.probes
  world.infos.set(PD, unavailable(PD))
  await registry.waitFor(states('unhealthy'))
  t.ok(world.probes <= again + 2)
  t.same(seen, ['unhealthy', 'healthy', 'unhealthy'], 'every change is announced once')
})

t.test('a node whose answers make no sense is unhealthy, logs why, and harms no other', async t => {
  const warned: unknown[] = []
  const { world, registry, add } = worldWith(t, { log: { ...silent, warn: data => { warned.push((data as { err?: Error }).err?.message) } } })
  add(PD, 'hybrid')
  add(E, 'encoder')
  await registry.waitFor(states('healthy', 'healthy'))
  for (const [field, value] of [['produces', [null]], ['accepts', 'features:x'], ['models', [7]], ['vision', 'some'], ['epoch', {}], ['role', 'toString']] as const) {
    world.infos.set(E, { [field]: value })
    await registry.waitFor(states('healthy', 'unhealthy'))
    t.match(warned.at(-1), new RegExp(`make no sense: ${field} `))
    world.infos.set(E, {})
    await registry.waitFor(states('healthy', 'healthy'))
  }
})

t.test('states that a node reports of itself', async t => {
  const { world, registry, add } = worldWith(t)
  for (const status of ['initialising', 'healthy', 'sleeping', 'draining'] as const) {
    if (status === 'initialising') add(PD, 'hybrid', { status })
    else world.infos.set(PD, { status })
    await registry.waitFor(states(status))
    t.same(registry.snapshot().models, status === 'healthy' ? ['m'] : [])
  }
})

t.test('links are made by themselves for every pair that has something to exchange', async t => {
  const { world, registry, add } = worldWith(t)
  add(PD, 'hybrid')
  add(E, 'encoder')
  add(E2, 'encoder')
  add('http://other:1', 'hybrid', { accepts: ['features:y'] })
  add('http://model:1', 'hybrid', { fingerprint: 'g' })
  await registry.waitFor(snapshot => snapshot.link(E, PD) === 'linked' && snapshot.link(E2, PD) === 'linked')
  const snapshot = await registry.waitFor(snapshot => snapshot.link(E, 'http://model:1') === 'refused')
  t.equal(snapshot.link(PD, E), 'none', 'a link has a direction')
  t.equal(snapshot.link(E, 'http://other:1'), 'none')
  t.match(snapshot.byId.get(E)!.links.get('http://model:1'), { state: 'refused', reason: /fingerprint/ })
  t.same(world.linking.sort(), [`${E}>${PD}`, `${E2}>${PD}`], 'one handshake a pair')
  t.match(await registry.ensureLink(E, PD), { from: E, to: PD, transport: 'world' })
  t.match(await refusal(registry.ensureLink(E, 'http://model:1')), { code: 'REFUSED', message: /fingerprint/ })
  t.match(await refusal(registry.ensureLink(E, 'http://other:1')), { code: 'REFUSED' })
  t.match(await refusal(registry.ensureLink(E, 'http://nobody')), { code: 'UNAVAILABLE' })
})

t.test('KV blocks go from prefill to decode nodes of a model, features to the node that prefills', async t => {
  const { world, registry, add } = worldWith(t)
  add(E, 'encoder')
  add(P, 'prefill')
  add(D, 'decode')
  add(PD, 'hybrid')
  add('http://d:2', 'decode', { models: ['other'] })
  add('http://d:3', 'decode', { fingerprint: 'g' })
  await registry.waitFor(snapshot => snapshot.link(P, 'http://d:3') === 'refused' && [[E, P], [E, PD], [P, D]].every(([from, to]) => snapshot.link(from!, to!) === 'linked'))
  t.same(world.linking.sort(), [`${E}>${P}`, `${E}>${PD}`, `${P}>${D}`])
  t.equal(registry.snapshot().link(P, 'http://d:2'), 'none')
  t.same(registry.get(P)!.notes, [], 'one link of it works')

  registry.refuseLinks(P, 'names no session')
  t.equal(registry.snapshot().link(P, D), 'refused')
  t.same(registry.get(P)!.notes, ['not used by plans: names no session', 'not used by plans: their models or processors differ (fingerprint)'])
  t.equal(registry.snapshot().link(E, P), 'linked', 'what it takes is another matter')
  t.match(await refusal(registry.ensureLink(P, D)), { code: 'REFUSED', message: 'names no session' })
  world.infos.set(P, { epoch: 2 })
  await registry.waitFor(snapshot => snapshot.link(P, D) === 'linked')
  registry.refuseLinks('http://nobody', 'x')
})

t.test('a model is offered when an answer can come of it', async t => {
  const { world, registry, add } = worldWith(t)
  const offers = async (models: readonly string[]): Promise<unknown> => await registry.waitFor(snapshot => snapshot.models.join() === models.join())
  add(E, 'encoder', { models: ['e'] })
  add(D, 'decode')
  await registry.waitFor(states('healthy', 'healthy'))
  await offers([])
  add(P, 'prefill')
  await offers(['m'])
  world.infos.set(P, unavailable(P))
  await offers([])
  world.infos.set(D, { standalone: true })
  await offers(['m'])
})

t.test('the log names one of our engines that is registered under two URLs, once', async t => {
  const warned: unknown[] = []
  const { registry, add } = worldWith(t, { log: { ...silent, warn: data => { warned.push(data) } } })
  const ours = { backend: 'fastify-epd/1 pytorch', epoch: 7 }
  for (const [url, info] of [[E, ours], [E2, ours], [PD, { ...ours, epoch: 8 }]] as const) {
    add(url, 'hybrid', info)
    await registry.waitFor(({ byId }) => byId.get(url)?.state === 'healthy')
  }
  await registry.ask(E2)
  t.same(warned, [{ node: E2, same_as: E }])
})

t.test('without an epoch a node that was away is another process: its links are made again', async t => {
  const { world, registry, add } = worldWith(t)
  add(P, 'prefill', { epoch: undefined })
  add(D, 'decode', { epoch: undefined })
  await registry.waitFor(snapshot => snapshot.link(P, D) === 'linked')
  world.infos.set(P, unavailable(P))
  await registry.waitFor(states('unhealthy', 'healthy'))
  world.infos.set(P, { epoch: undefined })
  await until(() => world.linking.length === 2 && registry.snapshot().link(P, D) === 'linked', 'linked again')
  registry.add({ url: D, role: 'decode', adapter: 'world' })
  await until(() => world.linking.length === 3 && registry.snapshot().link(P, D) === 'linked', 'and when one registers again')
})

t.test('a use that is planned counts as load until it begins', async t => {
  const { registry, add } = worldWith(t)
  add(D, 'decode')
  await registry.waitFor(states('healthy'))
  const { load } = registry.get(D)!
  const free = registry.reserve(D, 7)
  t.match(load, { requests: 1, tokens: 7 })
  free()
  free()
  t.match(load, { requests: 0, tokens: 0 })
  t.same(registry.status()[D]!.latency, [], 'and says nothing about its speed')
  registry.reserve('http://nobody')()
})

t.test('a restart of either end makes the link again, and ends the old process\'s accounts', async t => {
  const { world, registry, add } = worldWith(t, { breakerFailures: 1 })
  add(E, 'encoder')
  add(PD, 'hybrid')
  await registry.waitFor(snapshot => snapshot.link(E, PD) === 'linked')
  const old = registry.acquire(PD, 'decode', 80)
  registry.acquire(PD, 'prefill').end(unavailable(PD), 'failed')
  t.match(registry.get(PD), { load: { requests: 1, tokens: 80 }, breakers: { prefill: 'open', decode: 'closed' } })
  world.infos.set(PD, { epoch: 2 })
  await until(() => world.linking.length === 2 && registry.snapshot().link(E, PD) === 'linked', 'linked again')
  t.match(registry.get(PD), { load: { requests: 0, tokens: 0 }, breakers: { prefill: 'closed' }, info: { epoch: 2 } })
  const fresh = registry.acquire(PD, 'decode', 5)
  old.end()
  t.match(registry.get(PD)!.load, { requests: 1, tokens: 5 }, 'a ticket of the old process does not count against the new')
  fresh.end()
  world.infos.set(E, unavailable(E))
  await registry.waitFor(states('unhealthy', 'healthy'))
  world.infos.set(E, { epoch: 9 })
  await until(() => world.linking.length === 3 && registry.snapshot().link(E, PD) === 'linked', 'linked a third time')
  world.infos.set(E, unavailable(E))
  await registry.waitFor(states('unhealthy', 'healthy'))
  world.infos.set(E, { epoch: 9 })
  await registry.waitFor(states('healthy', 'healthy'))
  t.equal(world.linking.length, 3, 'the same process keeps its links')
})

t.test('handshakes: one at a time for a pair, tried again after a failure, refusals rest until a restart or a warm-up', async t => {
  const { world, registry, add } = worldWith(t)
  let fail: Error | undefined = unavailable(PD)
  let release: (() => void) | undefined
  world.onLink = async () => {
    if (release === undefined && fail === undefined) await new Promise<void>(resolve => { release = resolve })
    if (fail !== undefined) throw fail
  }
  add(E, 'encoder')
  add(PD, 'hybrid')
  await registry.waitFor(snapshot => snapshot.link(E, PD) === 'failed')
  t.match(await refusal(registry.ensureLink(E, PD)), { code: 'UNAVAILABLE' })
  fail = undefined
  await until(() => release !== undefined, 'it is tried again')
  const count = world.linking.length
  const controller = new AbortController()
  const waiting = [registry.ensureLink(E, PD), registry.ensureLink(E, PD), registry.ensureLink(E, PD, controller.signal)]
  controller.abort(new Error('enough'))
  t.match(await refusal(waiting[2]!), { message: 'enough' })
  release!()
  await Promise.all(waiting.slice(0, 2))
  t.equal(world.linking.length, count, 'all join the handshake under way')

  fail = new AdapterError('REFUSED', 'blocks differ', { node: PD })
  registry.linkLost(E, PD)
  await registry.waitFor(snapshot => snapshot.link(E, PD) === 'refused')
  const refused = world.linking.length
  const { probes } = world
  await until(() => world.probes > probes + 6, 'some probes later')
  t.equal(world.linking.length, refused, 'a refused pair rests')
  t.match(await registry.warmUp(), [{ state: 'refused', reason: 'blocks differ' }])
  fail = undefined
  t.match(await registry.warmUp(), [{ state: 'linked', link: { transport: 'world' } }])
  fail = new AdapterError('REFUSED', 'blocks differ', { node: PD })
  registry.linkLost(E, PD)
  await registry.waitFor(snapshot => snapshot.link(E, PD) === 'refused')
  fail = undefined
  world.infos.set(PD, { epoch: 2 })
  await registry.waitFor(snapshot => snapshot.link(E, PD) === 'linked')
})

t.test('a removed node is gone with its links, its token and its probes', async t => {
  const { world, registry, add } = worldWith(t)
  add(E, 'encoder')
  add(PD, 'hybrid')
  await registry.waitFor(snapshot => snapshot.link(E, PD) === 'linked')
  const token = registry.tokenFor(PD)!
  t.equal(registry.isNodeToken(token), PD)
  t.equal(registry.isNodeToken('guess'), undefined)
  const ticket = registry.acquire(PD, 'decode')
  t.equal(registry.remove(PD), true)
  ticket.end()
  registry.acquire(PD, 'decode').end()
  registry.linkLost(E, PD)
  registry.probe(PD)
  t.equal(registry.tokenFor(PD), undefined)
  t.equal(registry.isNodeToken(token), undefined)
  t.same([...registry.get(E)!.links], [])
  await until(() => world.unlinked.includes(`${E}>${PD}`), 'both ends are unlinked')
})

t.test('tickets count once, feed the latencies, and report the outcome to the breaker', async t => {
  const { registry, add } = worldWith(t, { breakerFailures: 2, breakerCooldown: 40 })
  add(PD, 'hybrid')
  await registry.waitFor(states('healthy'))
  const { load, breakers } = registry.get(PD)!
  const ticket = registry.acquire(PD, 'decode', 100)
  t.match(load, { requests: 1, tokens: 100 })
  t.equal(registry.status()[PD]!.unfinished, 1)
  ticket.end()
  ticket.end()
  t.match(load, { requests: 0, tokens: 0 })
  t.equal(registry.status()[PD]!.latency.length, 1)
  for (let i = 0; i < 5; i++) registry.acquire(PD, 'decode').end(new AdapterError('REJECTED', '', { node: PD }), 'alive')
  for (let i = 0; i < 5; i++) registry.acquire(PD, 'decode').end(new DOMException('x', 'AbortError'))
  t.equal(breakers.decode, 'closed', 'only failures count')
  t.equal(load.failing, false)
  registry.acquire(PD, 'decode').end(unavailable(PD), 'failed')
  t.equal(load.failing, true)
  registry.acquire(PD, 'decode').end(new DOMException('x', 'AbortError'))
  t.equal(load.failing, true, 'what shows nothing of the node does not count')
  registry.acquire(PD, 'decode').end()
  t.equal(load.failing, false)
  registry.acquire(PD, 'decode').end(unavailable(PD), 'failed')
  t.equal(breakers.decode, 'closed', 'only failures in a row')
  registry.acquire(PD, 'decode').end(unavailable(PD), 'failed')
  t.match(breakers, { decode: 'open', encode: 'closed' })
  await until(() => breakers.decode === 'half-open', 'the cooldown is over')
  const trial = registry.acquire(PD, 'decode')
  t.equal(breakers.decode, 'open', 'one trial at a time')
  trial.end(new Error('aborted'))
  t.equal(breakers.decode, 'half-open', 'an abort decides nothing')
  registry.acquire(PD, 'decode').end(unavailable(PD), 'failed')
  t.equal(breakers.decode, 'open')
  await until(() => breakers.decode === 'half-open', 'the cooldown is over')
  const good = registry.acquire(PD, 'decode')
  good.ok()
  t.equal(breakers.decode, 'closed', 'closed at the first good event')
  t.equal(load.requests, 1, 'and still in flight')
  good.end(unavailable(PD), 'failed')
  t.equal(load.requests, 0)
  t.equal(load.failing, true, 'how it ends counts all the same')
})

t.test('a node that begins every answer well and breaks it off opens its breaker, after a good trial too', async t => {
  const { registry, add } = worldWith(t, { breakerFailures: 2, breakerCooldown: 20 })
  add(PD, 'hybrid')
  const { breakers } = (await registry.waitFor(states('healthy'))).nodes[0]!
  const use = (): void => {
    const ticket = registry.acquire(PD, 'decode')
    ticket.ok()
    ticket.end(unavailable(PD), 'failed')
  }
  use()
  t.equal(breakers.decode, 'closed')
  use()
  t.equal(breakers.decode, 'open')
  await until(() => breakers.decode === 'half-open', 'the cooldown is over')
  use()
  t.equal(breakers.decode, 'closed', 'the trial has begun well')
  use()
  t.equal(breakers.decode, 'open', 'its end has counted')
})

t.test('a late answer from before it opened does not close a breaker', async t => {
  const breaker = new Breaker(1, 10_000)
  breaker.end('failed', breaker.begin())
  breaker.end('alive', false)
  t.equal(breaker.state, 'open')
  breaker.reset()
  t.equal(breaker.state, 'closed')
})

t.test('snapshots are frozen, and closing ends everything that waits', async t => {
  const { world, registry, add } = worldWith(t)
  world.onLink = async () => await new Promise(() => {})
  add(E, 'encoder')
  add(PD, 'hybrid')
  const snapshot = await registry.waitFor(states('healthy', 'healthy'))
  t.ok(Object.isFrozen(snapshot) && Object.isFrozen(snapshot.nodes) && Object.isFrozen(snapshot.nodes[0]) && Object.isFrozen(snapshot.nodes[0]!.models))
  const controller = new AbortController()
  const stopped = refusal(registry.waitFor(() => false, { signal: controller.signal }))
  controller.abort(new Error('stop'))
  t.match(await stopped, { message: 'stop' })
  t.match(await refusal(registry.waitFor(() => false, { signal: controller.signal })), { message: 'stop' })
  const waiting = refusal(registry.waitFor(() => false))
  world.onLink = async () => {}
  registry.close().catch(() => {})
  t.match(await waiting, { message: 'the registry is closed' })
})
