import t, { type Test } from 'tap'
import { once } from 'node:events'
import type { Worker } from 'node:worker_threads'
import { Dealer, Router } from 'zeromq'
import { MAX_LATE_IN_ALL, Replies } from '../../engines/p2p/serving.ts'
import type { P2PEndpointInfo } from '../../engines/p2p/types.ts'
import { Writer } from '../../engines/p2p/sockets.ts'
import { decodeReply, decodeRequest } from '../../engines/p2p/wire.ts'
import { until } from '../helper/until.ts'
import { Peer, type Offer } from './peer.ts'

/** Members that every object has without having been given them: names that a table must not find. */
const INHERITED = Object.getOwnPropertyNames(Object.prototype)

async function open (t: Test, id: string, epoch = 1): Promise<Peer> {
  const peer = await Peer.open(id, { ipc: false, epoch })
  t.teardown(() => peer.close())
  return peer
}

/** A peer that sends what it likes. */
function stranger (t: Test, { node }: Peer): { send: (header: object | string | Buffer, ...more: string[]) => Promise<void>, answer: () => Promise<Record<string, unknown>> } {
  const socket = new Dealer({ linger: 0, sendTimeout: 2000, receiveTimeout: 5000 })
  t.teardown(() => { socket.close() })
  socket.connect(node.endpoint.tcp)
  return {
    send: async (header, ...more) => { await socket.send([typeof header === 'string' || Buffer.isBuffer(header) ? header : JSON.stringify(header), ...more]) },
    // A server that a loaded machine holds up says in between that it is alive.
    answer: async () => {
      for (;;) {
        const reply = JSON.parse(String((await socket.receive())[0])) as Record<string, unknown>
        if (reply.type !== 'alive') return reply
      }
    }
  }
}

/** The frame of a pull, with an id of its own. */
function pullOf ({ name, blocks }: Offer, from: string, more: object = {}): { id: string } & Record<string, unknown> {
  const { engineId: engine, epoch, lease } = name
  const bytes = blocks.length * (16 << 10)
  return { v: 1, type: 'pull', id: crypto.randomUUID(), from, engine, epoch, lease, link: epoch, pool: 'feature', blocks, bytes, chunk: 1 << 20, window: 3, ...more }
}

async function pulls (consumer: Peer, offer: Offer): Promise<boolean> {
  const localBlocks = consumer.feature.allocate(offer.blocks.length) as number[]
  try {
    await consumer.node.pull({ ...offer.name, pool: 'feature', remoteBlocks: offer.blocks, localBlocks, timeoutMs: 5000 })
    return consumer.holds(localBlocks)
  } finally {
    consumer.feature.release(localBlocks)
  }
}

t.test('no frame ends the transfer socket: forged ones are counted, and the next pull is served', async t => {
  const a = await open(t, 'http://a')
  const b = await open(t, 'http://b', 2)
  await b.node.connect(a.node.endpoint)
  const { send } = stranger(t, a)
  const common = { v: 1, id: 'x', from: 'http://c', engine: 'http://a', epoch: 1, lease: 'l', link: 1 }
  const frames: Array<object | string> = [
    ...INHERITED.map(type => ({ v: 1, id: 'x', type })),
    ...INHERITED.map(pool => ({ ...common, type: 'pull', pool, blocks: [0], bytes: 1, chunk: 1, window: 1 })),
    '', 'null', '[]', '{}', '{"v":1', 'x'.repeat(10_000), { v: 2, id: 'x', type: 'hello' }, { v: 1, id: {}, type: 'hello' }, { v: 1, id: 'x', type: ['hello'] },
    { ...common, type: 'pull', pool: 'feature', blocks: [-1], bytes: 1, chunk: 1, window: 1 },
    { ...common, type: 'pull', pool: 'feature', blocks: 'all', bytes: 1, chunk: 1, window: 1 },
    { ...common, type: 'credit', upto: 1e300 }, { ...common, type: 'ack', lease: 7 }, { ...common, type: 'ask', lease: null }, { ...common, type: 'offer', lease: ['l'] }, { ...common, type: 'offered', offer: {} }
  ]
  for (const frame of frames) await send(frame)
  await until(() => a.node.refused.malformed === frames.length, 'all frames are counted')
  t.equal(a.node.problem, undefined)
  t.ok(await pulls(b, a.offer(3)))
})

t.test('a lease is one engine\'s, for so many bytes, and no pull of it is made twice', async t => {
  const a = await open(t, 'http://a')
  const [b, c] = [await open(t, 'http://b', 2), await open(t, 'http://c', 3)]
  for (const peer of [b, c]) await peer.node.connect(a.node.endpoint)
  const { send, answer } = stranger(t, a)
  const offer = a.offer(2)
  t.ok(await pulls(b, offer))
  await t.rejects(pulls(c, offer), { code: 'GONE', message: /another engine's/ })
  await t.rejects(c.node.ack(offer.name), { code: 'GONE', message: /another engine's/ })
  t.same(offer.ends, [], 'nor can another engine end it')

  const own = pullOf(offer, 'http://b')
  await send(own)
  await until(async () => (await answer()).type === 'chunk', 'the pull is served')
  await send({ v: 1, type: 'credit', id: own.id, upto: 4 })
  await send(own)
  t.match(await answer(), { type: 'error', code: 'GONE', message: /made before/ })

  await send(pullOf(offer, 'http://b', { blocks: Array.from({ length: 500 }, () => offer.blocks[0]), bytes: 500 * (16 << 10) }))
  t.match(await answer(), { type: 'error', code: 'REFUSED', message: /other blocks/ }, 'a block counts once')
  let spent: unknown
  for (let i = 0; i < 20 && spent === undefined; i++) await pulls(b, offer).catch((err: Error) => { spent = err })
  t.match(spent, { code: 'GONE', message: /too often/ })
  t.match(a.node.refused, { foreign: 2, replay: 1, blocks: 1, spent: 1, malformed: 0 })
  t.equal((await b.node.ack(offer.name)).ended, true)
  await until(() => a.idle, 'nothing is held')
})

t.test('a credit that comes before the chunk is known to be sent ends its pull as well', async t => {
  const a = await open(t, 'http://a')
  const b = await open(t, 'http://b', 2)
  await b.node.connect(a.node.endpoint)
  const { send, answer } = stranger(t, a)
  for (let i = 0; i < 40; i++) {
    const own = pullOf(a.offer(1), 'http://b')
    await send(own)
    const seen = { chunk: false }
    const chunk = answer().finally(() => { seen.chunk = true })
    const credit = { v: 1, type: 'credit', id: own.id, upto: 4 }
    while (!seen.chunk) await send(credit)
    t.equal((await chunk).type, 'chunk')
    await send(credit)
    await send(own)
    // One that were still held would be told nothing: the first is under way.
    t.match(await answer(), { type: 'error', code: 'GONE', message: /made before/ })
  }
})

t.test('an id that is used again while its first pull is being refused loses nothing', async t => {
  const a = await open(t, 'http://a')
  const { send, answer } = stranger(t, a)
  for (let i = 0; i < 20; i++) {
    const offer = a.offer(1)
    const own = pullOf(offer, 'http://b')
    const frames = [{ ...own, lease: '0'.repeat(16) }, { v: 1, type: 'cancel', id: own.id }, own]
    await Promise.all(frames.map(async frame => { await send(frame) }))
    t.match(await answer(), { type: 'error', code: 'GONE' })
    t.equal((await answer()).type, 'chunk')
    await send({ v: 1, type: 'credit', id: own.id, upto: 4 })
    a.leases.end(offer.lease.id, 'release')
  }
  await until(() => a.idle, 'nothing is held')
})

/** A producer that answers hellos, and each other request with what `answer` makes of it. */
async function evilProducer (t: Test, like: Peer, answer: (request: { type: string, id: string }) => string | undefined): Promise<P2PEndpointInfo> {
  const router = new Router({ linger: 0 })
  await router.bind('tcp://127.0.0.1:*')
  t.teardown(() => { router.close() })
  const serve = async (): Promise<void> => {
    for await (const [peer, header] of router) {
      const request = JSON.parse(String(header)) as { type: string, id: string }
      const reply = answer(request)
      if (reply !== undefined) await router.send([peer!, reply])
    }
  }
  serve().catch(() => { /* closed */ })
  return { ...like.node.endpoint, engine: 'http://evil', epoch: 7, tcp: router.lastEndpoint! }
}

const DEEP = (depth: number): string => '['.repeat(depth) + ']'.repeat(depth)

t.test('a reply that is deep or huge ends neither the transfer worker nor a link', async t => {
  const a = await open(t, 'http://a')
  const b = await open(t, 'http://b', 2)
  let offer = ''
  const evil = await evilProducer(t, a, ({ type, id }) => type === 'hello'
    ? JSON.stringify({ v: 1, id, type: 'welcome', engine: 'http://evil', epoch: 7 })
    : `{"v":1,"id":"${id}","type":"offered","offer":${offer}}`)
  for (const endpoint of [a.node.endpoint, evil]) await b.node.connect(endpoint)
  const objects = JSON.stringify({ x: Array.from({ length: 200_000 }, () => ({})) })
  const offers = [...[10, 1000, 5000, 20_000, 1_000_000].map(depth => `{"x":${DEEP(depth)}}`), JSON.stringify({ remote_block_ids: Array.from({ length: 1_000_000 }, () => 0) }), objects]
  for (const [i, one] of offers.entries()) {
    offer = one
    const stop = new AbortController()
    const asked = t.rejects(b.node.ask({ engineId: 'http://evil', lease: 'l' }, { signal: stop.signal, timeoutMs: 60_000 }), { code: 'ABORTED' })
    await until(() => b.node.refused.malformed === i + 1, 'it is refused')
    stop.abort()
    await asked
  }
  t.equal(b.node.problem, undefined)
  t.same(b.node.peers().map(({ engineId }) => engineId), ['http://a', 'http://evil'])
  offer = JSON.stringify({ remote_block_ids: Array.from({ length: 10_000 }, (_, i) => i) })
  t.equal((await b.node.ask({ engineId: 'http://evil', lease: 'l' }) as { remote_block_ids: number[] }).remote_block_ids.length, 10_000, 'a large one of the right form is read')
  t.ok(await pulls(b, a.offer(2)))
})

t.test('no header is deep, whatever its type', async t => {
  const common = { v: 1, id: 'x', from: 'a', engine: 'b', epoch: 1, lease: 'l', link: 1, pool: 'kv', blocks: [1], bytes: 1, chunk: 1, window: 1, upto: 1, seq: 0, offset: 0, dtype: 'float32', dims: [1], crc32: 0, ended: true, offer: { ids: [1] }, code: 'GONE', message: 'm' }
  for (const [types, decode] of [[['hello', 'pull', 'credit', 'cancel', 'ack', 'release', 'offer', 'ask'], decodeRequest], [['welcome', 'chunk', 'ended', 'offered', 'error', 'alive'], decodeReply]] as const) {
    for (const type of types) {
      const header = JSON.stringify({ ...common, type })
      t.match(decode(Buffer.from(header)), { type })
      t.equal(decode(Buffer.from(`${header.slice(0, -1)},"more":${DEEP(20_000)}}`)), undefined, type)
    }
  }
})

t.test('a producer that answers a request with what answers another one ends that request, not more', async t => {
  const a = await open(t, 'http://a')
  const b = await open(t, 'http://b', 2)
  const replies: Record<string, object> = {
    welcome: { engine: 'http://evil', epoch: 7 },
    ended: { ended: true },
    offered: { offer: {} },
    chunk: { seq: 0, offset: 0, dtype: 'float32', dims: [0], crc32: 0 }
  }
  let wrong: { to: string, type: string } | undefined
  const evil = await evilProducer(t, a, ({ type, id }) => {
    const answer = type === wrong?.to ? wrong.type : type === 'hello' ? 'welcome' : undefined
    return answer === undefined ? undefined : JSON.stringify({ v: 1, id, type: answer, ...replies[answer] })
  })
  const name = { engineId: 'http://evil', epoch: 7, lease: 'l' }

  for (const type of ['ended', 'chunk', 'offered']) {
    wrong = { to: 'hello', type }
    await t.rejects(b.node.connect(evil), { code: 'GONE' })
  }
  replies.welcome = { engine: 'http://other', epoch: 7 }
  wrong = undefined
  await t.rejects(b.node.connect(evil), { code: 'STALE' }, 'another process answers')
  replies.welcome = { engine: 'http://evil', epoch: 7 }
  await b.node.connect(evil)
  const localBlocks = b.feature.allocate(1) as number[]
  for (const type of ['welcome', 'ended', 'chunk', 'offered']) {
    wrong = { to: 'pull', type }
    await t.rejects(b.node.pull({ ...name, pool: 'feature', remoteBlocks: [0], localBlocks }), { name: 'P2PError', code: /GONE|CORRUPT/ }, `${type} is no pull: nothing was written`)
  }
  for (const type of ['welcome', 'chunk', 'offered']) {
    wrong = { to: 'ack', type }
    await t.rejects(b.node.ack(name), { code: 'GONE' })
  }
  for (const type of ['welcome', 'ended', 'chunk']) {
    wrong = { to: 'ask', type }
    await t.rejects(b.node.ask(name), { code: 'GONE' })
  }
  await b.node.connect(a.node.endpoint)
  t.ok(await pulls(b, a.offer(2)))
})

t.test('peers that read nothing are not answered without bound, however many they are', async t => {
  // Buffers of a fixed size: by itself the system makes room for all of it.
  const [sendBufferSize, receiveBufferSize] = [64 << 10, 64 << 10]
  const router = new Router({ linger: 0, mandatory: true, sendTimeout: 0, sendHighWaterMark: 64, sendBufferSize })
  await router.bind('tcp://127.0.0.1:*')
  const peers = Array.from({ length: 6 }, () => new Dealer({ linger: 0, receiveHighWaterMark: 1, receiveBufferSize }))
  const replies = new Replies(new Writer(router), 60_000)
  t.teardown(() => {
    replies.close()
    for (const socket of [router, ...peers]) socket.close()
  })
  const text = 'x'.repeat(2000)
  for (const peer of peers) {
    peer.connect(router.lastEndpoint!)
    await peer.send('hello')
    const [name] = await router.receive()
    // Each more than one peer is granted.
    for (let i = 0; i < 5000; i++) replies.send(name!, { v: 1, type: 'error', id: String(i), code: 'GONE', message: text })
  }
  await until(() => replies.waiting === MAX_LATE_IN_ALL, 'the most that is held', 60_000)
  const [first] = peers as [Dealer]
  const read = async (): Promise<void> => { while (!first.closed) await first.receive() }
  read().catch(() => { /* closed */ })
  await until(() => replies.waiting < MAX_LATE_IN_ALL, 'one that reads gets what was held for it', 60_000)
})

t.test('a lease for a linked engine is pulled by no other', async t => {
  const a = await open(t, 'http://a')
  const [test, c] = [await open(t, 'test', 2), await open(t, 'http://c', 3)]
  for (const peer of [test, c]) await peer.node.connect(a.node.endpoint)
  await a.node.connect(test.node.endpoint)
  const offer = a.offer(2)
  await t.rejects(pulls(c, offer), { code: 'GONE', message: /another engine's/ })
  t.ok(await pulls(test, offer))
})

t.test('a transfer worker that ends is started anew at its place, and links are made again', async t => {
  const workers: Worker[] = []
  const onWorker = (worker: Worker): void => { workers.push(worker) }
  process.on('worker', onWorker)
  t.teardown(() => { process.off('worker', onWorker) })
  const a = await open(t, 'http://a')
  const b = await open(t, 'http://b', 2)
  await b.node.connect(a.node.endpoint)
  t.ok(await pulls(b, a.offer(3)))
  for (const [index, end] of [a, b].entries()) {
    const worker = workers[index] as Worker
    // No message of ours: the thread fails at it.
    worker.postMessage(null)
    await once(worker, 'exit')
    t.match(end.node.problem, /transfer worker has ended/)
    await until(() => end.node.problem === undefined, 'it works again')
    await until(() => b.node.peer('http://a') !== undefined, 'the link is there')
    await until(async () => await pulls(b, a.offer(3)).catch(() => false), 'blocks are pulled')
  }
  await Promise.all([a.close(), b.close()])
  t.equal(workers.length, 4)
})
