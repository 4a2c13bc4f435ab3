/** ECMooncakeConnector: E pushes features to the consumer. The servers are fakes, the consumer's control sockets real. */
import t, { type Test } from 'tap'
import { buildGateway } from '../helper/fake-gateway.ts'
import { ReceivePool } from '../helper/fake-mooncake.ts'
import { FakeVllm } from '../helper/fake-vllm.ts'
import { until } from '../helper/until.ts'
import { ask, type Told } from '../vllm/ask.ts'
import { chat, dataUrl, imagePart, picture, textPart } from '../vllm/pictures.ts'
import { bearsMalice, equalsPlain, type House } from '../vllm/scenarios.ts'
import type { EpdOptions } from '../../plugin/index.ts'

interface Pushing { readonly house: House, readonly e: readonly FakeVllm[], readonly pd: FakeVllm, readonly plain: FakeVllm, readonly pools: readonly ReceivePool[] }

async function pushing (t: Test, { encoders = 1, replicas = 1, embeds = true } = {}): Promise<Pushing> {
  const pools = await Promise.all(Array.from({ length: replicas }, async () => await ReceivePool.listen(t)))
  const plain = await FakeVllm.start(t, { server: 'plain' })
  const e = await Promise.all(Array.from({ length: encoders }, async () => await FakeVllm.start(t, { server: 'e', pools })))
  const pd = await FakeVllm.start(t, { server: 'pd', pools, embeds })
  return {
    e,
    pd,
    plain,
    pools,
    house: {
      plain: plain.url,
      peers: [...e, pd].map(fake => ({ url: fake.url, role: fake === pd ? 'hybrid' : 'encoder', alive: async () => fake.alive, ...(fake === pd ? { ecZmqAddrs: pools.map(pool => pool.address) } : {}) })),
      folder: { clear: async () => {}, truncate: async () => {}, outside: async () => [] },
      patience: 10_000
    }
  }
}

async function gateway (t: Test, { house: { peers } }: Pushing, options: EpdOptions = {}): Promise<(body: object) => Promise<Told>> {
  const nodes = peers.map(({ url, role, ecZmqAddrs }) => ({ url, role, adapter: 'vllm', ...(ecZmqAddrs === undefined ? {} : { ecZmqAddrs }) }))
  const { app, url } = await buildGateway(t, { options: { nodes, ...options } })
  await app.epd.nodes.waitFor(({ nodes }) => nodes.every(node => node.state === 'healthy'), { signal: AbortSignal.timeout(10_000) })
  await app.epd.nodes.warmUp()
  return async body => await ask(url, body)
}

const asking = (...seeds: number[]): object => chat([...seeds.map(seed => imagePart(dataUrl(picture(seed, 56 + 28 * (seed % 4))))), textPart('what is it')])
const idle = async ({ pools }: Pushing): Promise<void> => { await until(() => pools.every(pool => pool.waiting === 0), 'no memory is kept') }

for (const handoff of ['auto', 'raw'] as const) {
  t.test(`features are pushed, ${handoff}: 40 pictures equal the plain server`, async t => {
    const servers = await pushing(t, { encoders: 2, replicas: 2 })
    await equalsPlain(t, servers.house, { count: 40, seed: 11, plan: 'e-pd', options: { vllm: { handoff } } })
    t.equal(servers.pd.chats.some(({ body }) => JSON.stringify(body).includes('image_embeds')), handoff === 'auto')
    t.ok(servers.pd.chats.every(({ body, headers }) => body.ec_transfer_params == null || ['0', '1'].includes(String(headers['x-data-parallel-rank']))), 'at the replica that was named to E')
    await idle(servers)
  })
}

t.test('E gets the consumer and one name for each picture, PD the same names with the keys that E has answered', async t => {
  const servers = await pushing(t)
  const send = await gateway(t, servers)
  t.match(await send(asking(1, 2)), { status: 200, plan: 'e-pd', tokens: (await ask(servers.plain.url, asking(1, 2))).tokens })
  const order = servers.e[0]!.chats[0]!.body
  t.match(order.ec_transfer_params, { consumer_zmq: servers.pools[0]!.address, ec_items: [{ transfer_id: /^[0-9a-f]{32}$/ }, { transfer_id: /^[0-9a-f]{32}$/ }] })
  const { messages, ec_transfer_params: taken } = servers.pd.chats[0]!.body
  const uuids = (messages![0]!.content as ReadonlyArray<{ uuid?: string }>).slice(0, 2).map(part => part.uuid)
  t.same(taken!.ec_items, order.ec_transfer_params!.ec_items!.map((item, i) => ({ mm_hash: uuids[i], ...item })))
  t.equal(servers.pd.chats[0]!.headers['x-data-parallel-rank'], undefined, 'a single replica needs no rank')
  t.match(await send(chat([textPart('what is it')])), { status: 200, plan: 'pd' }, 'text goes to PD alone')
})

t.test('a small picture goes to an encoder too, and each picture each time: PD encodes nothing and E pushes for one request', async t => {
  const servers = await pushing(t)
  const send = await gateway(t, servers, { bypass: 'auto' })
  for (let i = 0; i < 2; i++) t.match(await send(asking(1)), { status: 200, plan: 'e-pd' })
  t.equal(servers.e[0]!.chats.length, 2)
})

t.test('no client harms E and PD', async t => { await bearsMalice(t, (await pushing(t)).house, {}, /^(400|503)$/) })

t.test('an encoder that fails: its pushes are cancelled, another encoder makes new ones', async t => {
  const servers = await pushing(t, { encoders: 2 })
  const send = await gateway(t, servers)
  for (const e of servers.e) e.faults.push('reset', 'reset')
  const told = await send(asking(1, 2, 3, 5))
  const cancelled = (): object[] => servers.pools[0]!.cancelled
  await until(() => cancelled().length > 0, 'the consumer has heard of it')
  t.match(cancelled()[0], { op: 'cancel', transfer_id: String, reservation_id: '', abandon: true })
  t.match(told, { status: /200|503/ })
  t.match(await send(asking(1, 2, 3, 5)), { status: 200, tokens: (await ask(servers.plain.url, asking(1, 2, 3, 5))).tokens })
  await idle(servers)
})

t.test('PD fails before it has taken the features: they are cancelled, but for what E may still write', async t => {
  const servers = await pushing(t)
  const send = await gateway(t, servers, { retries: 0 })
  servers.pd.faults.push('reset', 'reset', 'reset')
  t.match((await send(asking(1))).status, /50[23]/)
  const sent = servers.e[0]!.chats[0]!.body.ec_transfer_params!.ec_items![0]!.transfer_id!
  await until(() => servers.pools[0]!.cancelled.some(order => order.transfer_id === sent), 'the consumer has heard of it')
  t.notOk(servers.pools[0]!.cancelled.some(order => order.abandon === true))
  await idle(servers)
})

t.test('features that have not arrived: everything is encoded and pushed again, once', async t => {
  const servers = await pushing(t)
  const send = await gateway(t, servers)
  let lost = 0
  const [pool] = servers.pools as [ReceivePool]
  const push = pool.push.bind(pool)
  pool.push = (transfer, embedding) => { if (lost++ > 0) push(transfer, embedding) }
  t.match(await send(asking(1)), { status: 200, plan: 'e-pd', tokens: (await ask(servers.plain.url, asking(1))).tokens })
  t.equal(servers.e[0]!.chats.length, 2)
  t.equal(servers.pd.deaths, 0)
})

t.test('a PD without --enable-mm-embeds gets pictures beside what was pushed', async t => {
  const servers = await pushing(t, { embeds: false })
  const send = await gateway(t, servers)
  for (let i = 0; i < 2; i++) t.match(await send(asking(1)), { status: 200, plan: 'e-pd', tokens: (await ask(servers.plain.url, asking(1))).tokens })
  t.match(servers.pd.chats.at(-1)!.body, { ec_transfer_params: { ec_items: [{ transfer_id: String }] } })
  await idle(servers)
})

t.test('no encoder is left: a clear error, because PD encodes nothing', async t => {
  const servers = await pushing(t)
  const send = await gateway(t, servers)
  await servers.e[0]!.kill()
  t.match(await send(asking(1)), { status: 503, error: { message: /.../ } })
})
