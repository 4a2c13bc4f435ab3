import t from 'tap'
import { once } from 'node:events'
import { Dealer, Router, type MessageLike } from 'zeromq'
import { crc32 } from 'node:zlib'
import type { P2PEndpointInfo } from '../../engines/p2p/index.ts'
import { until } from '../helper/until.ts'
import { EngineProcess } from './engine-process.ts'
import { FlakyProxy } from './flaky-proxy.ts'
import { BLOCK_BYTES, Peer, type Offer, type PeerOptions } from './peer.ts'

const full = process.env.EPD_TEST_FULL === '1'
const MIB = 1 << 20
const LARGE = 8 * MIB / BLOCK_BYTES

type Test = { teardown: (fn: () => Promise<void>) => void }

async function open (t: Test, id: string, options: PeerOptions = {}): Promise<Peer> {
  const peer = await Peer.open(id, { blocks: 2048, chunkBytes: 256 << 10, ...options })
  t.teardown(() => peer.close())
  return peer
}

/** A producer behind a faulty wire, and a linked consumer. */
async function faulty (t: Test, consumer: PeerOptions = {}): Promise<{ a: Peer, b: Peer, proxy: FlakyProxy }> {
  const a = await open(t, 'http://a')
  const { proxy, endpoint } = await FlakyProxy.before(a.node.endpoint)
  t.teardown(() => proxy.close())
  const b = await open(t, 'http://b', { epoch: 2, ...consumer })
  await b.node.connect(endpoint)
  return { a, b, proxy }
}

function pull (b: Peer, offer: Offer, localBlocks: number[], more: { signal?: AbortSignal, timeoutMs?: number } = {}): Promise<unknown> {
  return b.node.pull({ ...offer.name, pool: 'feature', remoteBlocks: offer.blocks, localBlocks, ...more })
}

const take = (peer: Peer, count: number): number[] => peer.feature.allocate(count) as number[]

async function idle (...peers: Peer[]): Promise<void> {
  await until(() => peers.every((peer) => peer.idle), 'all blocks are free and no lease is open')
  for (const peer of peers) peer.feature.checkIntegrity()
}

t.test('a corrupted chunk is noticed, and the next pull of the same lease is whole', async (t) => {
  const { a, b, proxy } = await faulty(t)
  const offer = a.offer(LARGE)
  const localBlocks = take(b, LARGE)
  for (const at of [MIB, 3 * MIB + 17]) {
    proxy.arm({ kind: 'flip', at })
    await t.rejects(pull(b, offer, localBlocks), { code: 'CORRUPT', message: /checksum/ })
  }
  proxy.arm({ kind: 'none' })
  await pull(b, offer, localBlocks)
  t.ok(b.holds(localBlocks))
  await b.node.ack(offer.name)
  b.feature.release(localBlocks)
  await idle(a, b)
})

t.test('a stalled peer ends the pull on both sides, and delays no other', async (t) => {
  const { a, b, proxy } = await faulty(t)
  const c = await open(t, 'http://c')
  await c.node.connect(a.node.endpoint)
  const [stalled, other] = [a.offer(LARGE), a.offer(LARGE, { seed: 2 })]
  const [slow, quick] = [take(b, LARGE), take(c, LARGE)]
  proxy.arm({ kind: 'stall', at: MIB })
  const stuck = pull(b, stalled, slow)
  await pull(c, other, quick)
  t.ok(c.holds(quick, 2), 'the other peer is served meanwhile')
  await t.rejects(stuck, { code: 'GONE' }, 'heartbeats notice')
  await until(() => a.served.some(({ outcome }) => outcome === 'peer-lost'), 'the producer gives the stalled pull up')
  t.equal(a.leases.end(stalled.lease.id, 'release'), true)
  await c.node.ack(other.name)
  b.feature.release(slow)
  c.feature.release(quick)
  await idle(a, b, c)
})

t.test('a stalled peer is no longer waited for when the time is over', async (t) => {
  const { a, b, proxy } = await faulty(t, { heartbeatMs: 60_000 })
  const offer = a.offer(LARGE)
  const localBlocks = take(b, LARGE)
  proxy.arm({ kind: 'stall', at: MIB })
  await t.rejects(pull(b, offer, localBlocks, { timeoutMs: 100 }), { code: 'TIMEOUT' })
  a.leases.end(offer.lease.id, 'release')
  b.feature.release(localBlocks)
  await idle(a, b)
})

t.test('a lost connection ends the pull at once, and comes back for the next one', async (t) => {
  const { a, b, proxy } = await faulty(t)
  const offer = a.offer(LARGE)
  const localBlocks = take(b, LARGE)
  proxy.arm({ kind: 'cut', at: MIB })
  await t.rejects(pull(b, offer, localBlocks), { code: 'GONE' })
  proxy.arm({ kind: 'none' })
  await pull(b, offer, localBlocks)
  t.ok(b.holds(localBlocks))
  await b.node.ack(offer.name)
  b.feature.release(localBlocks)
  await idle(a, b)
})

t.test('a peer that takes nothing gets a window and no more, then loses its pull', async (t) => {
  const a = await open(t, 'http://a', { stallTimeoutMs: 300, ipc: false })
  const offer = a.offer(LARGE)
  const idler = new Dealer({ linger: 0 })
  t.teardown(async () => idler.close())
  idler.connect(a.node.endpoint.tcp)
  const { lease, epoch } = offer.name
  const traceparent = '00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01'
  const say = (body: object): Promise<void> => idler.send(JSON.stringify({ v: 1, id: 'x', traceparent, from: 'http://idler', engine: 'http://a', epoch, link: epoch, lease, ...body }))
  const request = { type: 'pull', pool: 'feature', blocks: offer.blocks, bytes: LARGE * BLOCK_BYTES, chunk: 256 << 10, window: 3 }
  await say(request)
  await say(request)
  await idler.send('not a header')
  await say({ type: 'pull', blocks: 'none' })
  await say({ type: 'shout' })
  const seen: string[] = []
  for await (const [header] of idler) {
    const reply = JSON.parse(String(header)) as { type: string, code?: string, traceparent?: string }
    t.equal(reply.traceparent, traceparent, `${reply.type} carries the trace context of its pull`)
    if (reply.type !== 'alive') seen.push(reply.code ?? reply.type)
    if (reply.type === 'error') break
  }
  t.same(seen, ['chunk', 'chunk', 'chunk', 'TIMEOUT'])
  await until(() => a.served.length === 1, 'the pull is over')
  t.equal(a.served[0]?.outcome, 'stalled')
  t.same(offer.ends, [], 'the lease itself goes on until it ends')
  a.leases.end(offer.lease.id, 'release')
  await idle(a)
})

t.test('a burst of requests from a peer that does not read yet is answered whole, with the trace context of each', { skip: process.platform === 'win32' }, async (t) => {
  const a = await open(t, 'http://a')
  // The least room on the way: what zeromq and the kernel keep for it is far less than the burst.
  const hasty = new Dealer({ linger: 0, receiveHighWaterMark: 1, sendHighWaterMark: 0 })
  t.teardown(async () => hasty.close())
  hasty.connect(a.node.endpoint.ipc as string)
  const traceparent = (i: number): string => `00-0af7651916cd43dd8448eb211c80319c-${String(i).padStart(16, '0')}-01`
  const common = { v: 1, from: 'http://hasty', engine: 'http://a', epoch: 1, link: 1, lease: 'f'.repeat(1000) }
  const kinds = [{ type: 'ack' }, { type: 'pull', pool: 'feature', blocks: [0], bytes: 1, chunk: 65536, window: 1 }, { type: 'hello' }]
  const count = 3000
  for (let i = 0; i < count; i++) await hasty.send(JSON.stringify({ ...common, ...kinds[i % 3], id: String(i), traceparent: traceparent(i) }))
  await until(() => a.leases.asked >= count / 3, 'the last request has been looked at')
  const replies = new Map<string, string>()
  for await (const [header] of hasty) {
    const reply = JSON.parse(String(header)) as { id: string, type: string, traceparent: string }
    replies.set(reply.id, reply.traceparent === traceparent(Number(reply.id)) ? reply.type : 'no trace context')
    if (replies.size === count) break
  }
  t.same([...new Set(replies.values())].sort(), ['ended', 'error', 'welcome'])
  await idle(a)
})

t.test('a consumer killed in mid-pull leaves nothing behind', async (t) => {
  const a = await open(t, 'http://a')
  for (const ipc of [true, false]) {
    const consumer = await EngineProcess.start('http://b', { blocks: 2048, ipc, chunkBytes: 64 << 10, window: 1 })
    t.teardown(() => consumer.kill())
    await consumer.ask({ op: 'connect', endpoint: a.node.endpoint })
    const offer = a.offer(900, { ttlMs: 100 })
    consumer.tell({ op: 'pull', name: offer.name, blocks: offer.blocks, seed: 1 })
    await until(() => a.leases.running > 0, 'the pull runs')
    await consumer.kill()
    await until(() => offer.ends.length > 0, 'the lease expires once its pull is over')
    t.same(offer.ends, ['expired'])
    t.equal(a.served.at(-1)?.outcome, 'peer-lost')
  }
  await idle(a)
})

t.test('a producer killed and restarted on the same address is another one: STALE, never blocks', async (t) => {
  const first = await EngineProcess.start('http://a', { epoch: 1, ipc: false, blocks: 2048 })
  t.teardown(() => first.kill())
  const b = await open(t, 'http://b')
  await b.node.connect(first.endpoint)
  const { name, blocks } = await first.ask({ op: 'offer', count: 100, seed: 1 }) as Required<Pick<Offer, 'name' | 'blocks'>>
  const localBlocks = take(b, 100)
  const offer = { name, blocks } as Offer
  await first.kill()
  await t.rejects(pull(b, offer, localBlocks), { code: 'GONE' })
  const port = Number(new URL(first.endpoint.tcp).port)
  const second = await EngineProcess.start('http://a', { epoch: 2, ipc: false, blocks: 2048, port })
  t.teardown(() => second.kill())
  const fresh = await second.ask({ op: 'offer', count: 100, seed: 5 }) as Offer
  const code = async (given: Offer): Promise<string> => pull(b, given, localBlocks).then(() => 'OK', (err: { code: string }) => err.code)
  t.equal(await until(async () => { const got = await code(offer); return got !== 'GONE' && got }, 'the connection is back'), 'STALE')
  t.equal(await code(fresh), 'NOT_LINKED', 'the link is to the process before')
  await t.rejects(b.node.ack(name), { code: 'STALE' })
  await b.node.connect(second.endpoint)
  t.equal(await code(offer), 'STALE')
  t.equal(await code(fresh), 'OK')
  t.ok(b.holds(localBlocks, 5))
  t.match(await b.node.ack(fresh.name), { ended: true })
  t.match(await second.ask({ op: 'idle' }), { idle: true })
  b.feature.release(localBlocks)
  await idle(b)
})

t.test('once an aborted pull has settled, nothing is written into its blocks', async (t) => {
  const [a, b] = [await open(t, 'http://a'), await open(t, 'http://b', { chunkBytes: 1 * MIB })]
  await b.node.connect(a.node.endpoint)
  let [aborted, whole] = [0, 0]
  for (let round = 0; round < (full ? 300 : 30); round++) {
    const offer = a.offer(LARGE)
    const localBlocks = take(b, LARGE)
    const controller = new AbortController()
    const timer = setTimeout(() => controller.abort(), (round % 15) * 0.7)
    const settled = await pull(b, offer, localBlocks, { signal: controller.signal }).then(() => 'OK', (err: { code: string }) => err.code)
    clearTimeout(timer)
    if (settled === 'OK') whole++
    else if (settled === 'ABORTED') aborted++
    // The caller's own use of the blocks, from the moment the pull has settled.
    for (const id of localBlocks) b.feature.bytes(id).fill(round)
    const again = take(b, 4)
    await b.node.pull({ ...offer.name, pool: 'feature', remoteBlocks: offer.blocks.slice(0, 4), localBlocks: again })
    const mine = Buffer.alloc(BLOCK_BYTES, round)
    if (!localBlocks.every((id) => mine.equals(b.feature.bytes(id)))) t.fail(`round ${round} (${settled}): blocks were written later`)
    b.feature.release([...localBlocks, ...again])
    await b.node.ack(offer.name)
    await until(() => a.idle, 'the producer reads no more')
  }
  t.equal(aborted + whole, full ? 300 : 30)
  t.ok(aborted > 0, `${aborted} aborted, ${whole} whole`)
  await idle(a, b)
})

t.test('frames that come late or twice never land in the blocks of another transfer', async (t) => {
  const fake = new Router({ linger: 0, mandatory: true, sendTimeout: 1000 })
  t.teardown(async () => fake.close())
  await fake.bind('tcp://127.0.0.1:*')
  const b = await open(t, 'http://b')
  const endpoint: P2PEndpointInfo = { ...b.node.endpoint, engine: 'http://fake', epoch: 3, tcp: fake.lastEndpoint as string, ipc: null }
  const traceparent = '00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01'
  const chunk = (id: string, seq: number, byte: number): MessageLike[] => {
    const data = Buffer.alloc(BLOCK_BYTES, byte)
    return [JSON.stringify({ v: 1, type: 'chunk', id, seq, offset: seq * BLOCK_BYTES, dtype: 'float32', dims: [BLOCK_BYTES / 4], crc32: crc32(data), traceparent }), data]
  }
  const pulls: string[] = []
  const cancels: string[] = []
  const seen = new EventTarget()
  const headers: Array<{ type: string, traceparent?: string }> = []
  ;(async () => {
    for await (const [peer, frame] of fake) {
      const request = JSON.parse(String(frame)) as { type: string, id: string, traceparent?: string }
      headers.push(request)
      const say = (frames: MessageLike[]): Promise<void> => fake.send([peer as Buffer, ...frames])
      if (request.type === 'hello') await say([JSON.stringify({ v: 1, type: 'welcome', id: request.id, engine: 'http://fake', epoch: 3 })])
      if (request.type === 'cancel') cancels.push(request.id)
      if (request.type !== 'pull') continue
      pulls.push(request.id)
      seen.dispatchEvent(new Event('pull'))
      const [old] = pulls
      if (old === undefined || pulls.length !== 2) continue
      for (const frames of [chunk(old, 0, 66), chunk(request.id, 0, 7), chunk(request.id, 0, 67), chunk(old, 1, 68), chunk(request.id, 1, 8)]) await say(frames)
    }
  })().catch(() => {})
  await b.node.connect(endpoint, { traceparent })
  const lease = { engineId: 'http://fake', epoch: 3, lease: 'x', pool: 'feature' as const, remoteBlocks: [0, 1], bytes: 2 * BLOCK_BYTES, traceparent }
  const localBlocks = take(b, 2)
  const controller = new AbortController()
  const first = b.node.pull({ ...lease, localBlocks, signal: controller.signal })
  await once(seen, 'pull')
  controller.abort()
  await t.rejects(first, { code: 'ABORTED' })
  await b.node.pull({ ...lease, localBlocks })
  t.same(localBlocks.map((id) => b.feature.bytes(id)[9]), [7, 8])
  t.ok(cancels.includes(pulls[0] as string))
  await until(() => ['hello', 'pull', 'cancel', 'credit'].every((type) => headers.some((header) => header.type === type)), 'every kind of header has come')
  t.ok(headers.every((header) => header.traceparent === traceparent), 'every header carries the trace context')
  const wrong = b.node.pull({ ...lease, localBlocks })
  await once(seen, 'pull')
  await t.rejects(Promise.all([wrong, b.node.drop('http://fake')]), { code: 'GONE' }, 'dropping the link ends its pulls')
})

t.test('a node that closes rejects what is under way', async (t) => {
  const { a, b, proxy } = await faulty(t, { heartbeatMs: 60_000 })
  const offer = a.offer(LARGE)
  const localBlocks = take(b, LARGE)
  proxy.arm({ kind: 'stall', at: MIB })
  const stuck = pull(b, offer, localBlocks)
  await until(() => proxy.passed > MIB, 'the wire stalls')
  await Promise.all([t.rejects(stuck, { code: 'CLOSED' }), b.close()])
  a.leases.end(offer.lease.id, 'release')
  b.feature.release(localBlocks)
  await idle(a, b)
})
