/** Blocks that are offered, asked about and pulled while they are being filled. */
import { once } from 'node:events'
import type { Worker } from 'node:worker_threads'
import t from 'tap'
import { Dealer } from 'zeromq'
import { deferred } from '../../engines/service/waiting.ts'
import type { OfferName } from '../../engines/p2p/types.ts'
import { until } from '../helper/until.ts'
import { Peer } from './peer.ts'

async function pair (t: { teardown: (fn: () => Promise<void>) => void }): Promise<{ a: Peer, b: Peer, offers: Map<string, object>, heard: OfferName[] }> {
  const offers = new Map<string, object>()
  const heard: OfferName[] = []
  const a = await Peer.open('http://a', { offers, ipc: false })
  const b = await Peer.open('http://b', { onOffer: offer => heard.push(offer), ipc: false, epoch: 2 })
  t.teardown(() => a.close())
  t.teardown(() => b.close())
  await b.node.connect(a.node.endpoint)
  await a.node.connect(b.node.endpoint)
  return { a, b, offers, heard }
}

t.test('an offer reaches the engine it is for, which asks what it is', async t => {
  const { a, b, offers, heard } = await pair(t)
  offers.set('l1', { content_hash: 'x', num_tokens: 3 })
  a.node.offer('http://b', 'l1', '00-1-2-01')
  a.node.offer('http://c', 'l1')
  await until(() => heard.length > 0, 'the offer is there')
  t.same(heard, [{ engineId: 'http://a', lease: 'l1', traceparent: '00-1-2-01' }])
  t.same(await b.node.ask({ engineId: 'http://a', lease: 'l1' }), { content_hash: 'x', num_tokens: 3 })
  await t.rejects(b.node.ask({ engineId: 'http://a', lease: 'l2' }), { code: 'GONE' })
  await t.rejects(b.node.ask({ engineId: 'http://c', lease: 'l1' }), { code: 'NOT_LINKED' })
  await t.rejects(a.node.ask({ engineId: 'http://b', lease: 'l1' }), { code: 'GONE' }, 'an engine that offers nothing')
  t.same([a.node.refused.malformed, b.node.refused.malformed], [0, 0])
})

t.test('a pull of blocks that are being filled waits until they are', async t => {
  const { a, b } = await pair(t)
  const { promise: filled, resolve } = deferred<void>()
  const offer = a.offer(3, { filled })
  const localBlocks = b.feature.allocate(3) as number[]
  let over = false
  const pull = b.node.pull({ ...offer.name, pool: 'feature', remoteBlocks: offer.blocks, localBlocks }).finally(() => { over = true })
  // A second pull is served meanwhile: it asks the same thread after the first.
  const other = a.offer(3, { seed: 2 })
  const otherBlocks = b.feature.allocate(3) as number[]
  await b.node.pull({ ...other.name, pool: 'feature', remoteBlocks: other.blocks, localBlocks: otherBlocks })
  // Its puller has all before its server knows.
  await until(() => a.leases.running === 0, 'nothing is read')
  t.notOk(over, 'nothing reads the blocks that are being filled')
  resolve()
  await pull
  t.ok(b.holds(localBlocks))
  t.ok(b.holds(otherBlocks, 2))
  b.feature.release([...localBlocks, ...otherBlocks])
  for (const { lease } of [offer, other]) a.leases.end(lease.id, 'release')
  await until(() => a.idle && b.idle, 'nothing is left')
})

t.test('a pull of blocks that will not be filled is GONE, and one that was given up or whose engine closes reads nothing', async t => {
  for (const how of ['failed', 'given up', 'closed'] as const) {
    const { a, b } = await pair(t)
    const { promise: filled, resolve } = deferred<void>()
    const offer = a.offer(3, { filled })
    const localBlocks = b.feature.allocate(3) as number[]
    const stop = new AbortController()
    const pull = t.rejects(b.node.pull({ ...offer.name, pool: 'feature', remoteBlocks: offer.blocks, localBlocks, signal: stop.signal }), { code: how === 'given up' ? 'ABORTED' : 'GONE' }, how)
    // Its question came before this one, which is answered at once.
    await b.node.ask({ engineId: 'http://a', lease: 'none' }).catch(() => {})
    if (how === 'given up') stop.abort()
    if (how === 'closed') await a.node.close()
    else if (how === 'failed') a.leases.end(offer.lease.id, 'release')
    resolve()
    await pull
    a.leases.end(offer.lease.id, 'release')
    b.feature.release(localBlocks)
    await until(() => a.idle && b.idle && a.leases.running === 0, `nothing is left (${how})`)
  }
})

t.test('offers that anyone sends are handed on only when they name this process, and end nothing', async t => {
  const { b, heard } = await pair(t)
  const socket = new Dealer({ linger: 0, sendTimeout: 2000 })
  t.teardown(() => { socket.close() })
  socket.connect(b.node.endpoint.tcp)
  const good = { v: 1, type: 'offer', id: 'x', from: 'http://z', engine: 'http://b', epoch: 2, link: 2, lease: 'l' }
  const bad: object[] = [{ lease: 7 }, { lease: undefined }, { from: undefined }, { engine: 'http://c' }, { epoch: 1 }, { link: 1 }, { epoch: 'x' }, { lease: 'l'.repeat(5000) }, { v: 2 }, { id: 'x'.repeat(100) }]
  for (const change of bad) await socket.send(JSON.stringify({ ...good, ...change }))
  await socket.send(JSON.stringify({ ...good, type: 'offered', offer: {} }))
  await socket.send(JSON.stringify({ ...good, lease: 'last' }))
  await until(() => heard.length > 0, 'the good one has come')
  t.same(heard.map(({ engineId, lease }) => [engineId, lease]), [['http://z', 'last']])
})

t.test('a flood of offers holds up nobody: the main thread has a few of them at a time, the others are counted', async t => {
  const { b, heard } = await pair(t)
  const socket = new Dealer({ linger: 0, sendTimeout: 2000 })
  t.teardown(() => { socket.close() })
  socket.connect(b.node.endpoint.tcp)
  const offer = JSON.stringify({ v: 1, type: 'offer', id: 'x', from: 'http://z', engine: 'http://b', epoch: 2, link: 2, lease: 'l' })
  await socket.send(offer)
  await until(() => heard.length === 1, 'it is connected')
  const flood = 200
  const sent = Promise.all(Array.from({ length: flood }, async () => { await socket.send(offer) }))
  // This thread takes nothing meanwhile; the counts are in memory that both threads have.
  const nothing = new Int32Array(new SharedArrayBuffer(4))
  for (let i = 0; i < 500 && b.node.refused.flood === 0; i++) Atomics.wait(nothing, 0, 0, 20)
  t.ok(b.node.refused.flood > 0)
  await sent
  await until(() => heard.length - 1 + b.node.refused.flood === flood, 'each was handed on or counted')
  const before = heard.length
  await until(async () => {
    await socket.send(offer)
    return heard.length > before
  }, 'there is room again')
})

t.test('a transfer worker that ends while a pull waits leaves no pull behind, and the next one is asked anew', async t => {
  const workers: Worker[] = []
  const onWorker = (worker: Worker): void => { workers.push(worker) }
  process.on('worker', onWorker)
  t.teardown(() => { process.off('worker', onWorker) })
  const { a, b } = await pair(t)
  const { promise: filled, resolve } = deferred<void>()
  const offer = a.offer(3, { filled })
  const localBlocks = b.feature.allocate(3) as number[]
  const pull = t.rejects(b.node.pull({ ...offer.name, pool: 'feature', remoteBlocks: offer.blocks, localBlocks }), { code: 'GONE' })
  await b.node.ask({ engineId: 'http://a', lease: 'none' }).catch(() => {})
  const worker = workers[0] as Worker
  // No message of ours: the thread fails at it.
  worker.postMessage(null)
  await once(worker, 'exit')
  await pull
  await until(() => a.node.problem === undefined, 'it works again')
  resolve()
  await filled
  t.equal(a.leases.running, 0, 'the pull of the worker that has ended is not begun')
  const other = a.offer(3, { seed: 2 })
  await until(async () => await b.node.pull({ ...other.name, pool: 'feature', remoteBlocks: other.blocks, localBlocks }).then(() => true, () => false), 'blocks are pulled')
  t.ok(b.holds(localBlocks, 2))
  b.feature.release(localBlocks)
  for (const { lease } of [offer, other]) a.leases.end(lease.id, 'release')
  await until(() => a.idle && b.idle && a.leases.running === 0, 'nothing is left')
})
