import t from 'tap'
import { existsSync, mkdtempSync, readdirSync, rmSync, statSync } from 'node:fs'
import { hostname, tmpdir } from 'node:os'
import { dirname, join } from 'node:path'
import { BlockPool } from '../../engines/cache/index.ts'
import { sweepIpcDirs } from '../../engines/p2p/ipc-dir.ts'
import { P2PNode, parseEndpoint, type P2PEndpointInfo } from '../../engines/p2p/index.ts'
import { until } from '../helper/until.ts'
import { EngineProcess } from './engine-process.ts'
import { KEYS } from './keys.ts'
import { Peer, type PeerOptions } from './peer.ts'

const [keys, stranger, other, unknown] = KEYS

/** A producer and a consumer, closed with the test. */
async function pair (t: { teardown: (fn: () => Promise<void>) => void }, options: PeerOptions = {}, consumer: PeerOptions = {}): Promise<{ a: Peer, b: Peer }> {
  const a = await Peer.open('http://a', options)
  t.teardown(() => a.close())
  const b = await Peer.open('http://b', { ...options, epoch: 2, ...consumer })
  t.teardown(() => b.close())
  return { a, b }
}

for (const [name, options, transport] of [
  ['ipc', {}, 'ipc'], ['tcp', { ipc: false }, 'tcp'], ['tcp with CURVE', { ipc: false, curve: keys }, 'tcp'], ['ipc with CURVE', { curve: keys }, 'ipc']
] as const) {
  t.test(`blocks arrive bit for bit in another process over ${name}`, async (t) => {
    const consumer = await EngineProcess.start('http://b', { ...options, epoch: 2 })
    t.teardown(() => consumer.kill())
    const a = await Peer.open('http://a', options)
    t.teardown(() => a.close())
    const offers = [a.offer(1), a.offer(300, { seed: 7 })]
    t.equal((await consumer.ask({ op: 'connect', endpoint: a.node.endpoint })).transport, transport)
    for (const [seed, offer] of [[1, offers[0]], [7, offers[1]]] as const) {
      if (offer === undefined) continue
      t.match(await consumer.ask({ op: 'pull', name: offer.name, blocks: offer.blocks, seed }), { equal: true, transport, ended: true })
      t.same(offer.ends, ['ack'])
    }
    t.ok(a.idle)
    t.match(await consumer.ask({ op: 'idle' }), { idle: true })
  })
}

t.test('both pools are pulled by name, in part, at the same time and in both directions', async (t) => {
  const { a, b } = await pair(t)
  await Promise.all([a.node.connect(b.node.endpoint), b.node.connect(a.node.endpoint)])
  const pulls = [[a, b, 'feature'], [a, b, 'kv'], [b, a, 'feature'], [b, a, 'kv']] as const
  await Promise.all(pulls.map(async ([from, to, pool], seed) => {
    const { name, blocks, ends } = from.offer(9, { seed, pool })
    const localBlocks = to[pool].allocate(9) as number[]
    const part = blocks.slice(2, 6)
    await to.node.pull({ ...name, pool, remoteBlocks: blocks, localBlocks })
    t.ok(to.holds(localBlocks, seed, pool))
    const { bytes } = await to.node.pull({ ...name, pool, remoteBlocks: part, localBlocks: localBlocks.slice(0, 4), bytes: from[pool].blockBytes + 100 })
    t.equal(bytes, from[pool].blockBytes + 100)
    t.same(Buffer.from(to[pool].bytes(localBlocks[0] as number)), Buffer.from(from[pool].bytes(part[0] as number)))
    await to.node.release(name)
    t.same(ends, ['release'])
    to[pool].release(localBlocks)
  }))
  t.ok(a.idle && b.idle)
})

t.test('the largest chunk fits, encrypted too', async (t) => {
  for (const curve of [undefined, keys]) {
    const { a, b } = await pair(t, { blocks: 2048, chunkBytes: 8 << 20, curve })
    await b.node.connect(a.node.endpoint)
    const { name, blocks } = a.offer(700)
    const localBlocks = b.feature.allocate(700) as number[]
    await b.node.pull({ ...name, pool: 'feature', remoteBlocks: blocks, localBlocks })
    t.ok(b.holds(localBlocks))
  }
})

t.test('connecting is single flight and idempotent, and a new epoch replaces the link', async (t) => {
  const { a, b } = await pair(t)
  const { endpoint } = a.node
  const [one, two] = await Promise.all([b.node.connect(endpoint), b.node.connect(endpoint)])
  t.equal(one, two)
  t.equal(await b.node.connect(endpoint), one)
  t.equal(b.node.peers().length, 1)
  const again = await Peer.open('http://a', { epoch: 99 })
  t.teardown(() => again.close())
  const offer = a.offer(4)
  t.equal((await b.node.connect(again.node.endpoint)).epoch, 99)
  t.equal(b.node.peer('http://a')?.epoch, 99)
  const localBlocks = b.feature.allocate(4) as number[]
  const old = b.node.pull({ ...offer.name, pool: 'feature', remoteBlocks: offer.blocks, localBlocks })
  await t.rejects(old, { code: 'STALE' }, 'a lease of the process before')
  t.equal(await b.node.drop('http://a'), true)
  t.equal(await b.node.drop('http://a'), false)
  await t.rejects(b.node.ack(offer.name), { code: 'NOT_LINKED' })
})

t.test('a link that is dropped while it is being made is no link, and the next one is', async (t) => {
  const { a, b } = await pair(t)
  const { endpoint } = a.node
  for (const busy of [true, false]) {
    const dropped = t.rejects(b.node.connect(endpoint), { code: 'GONE' })
    // The workers shake hands meanwhile; this thread learns of it after it has dropped the link.
    if (busy) Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 200)
    t.equal(await b.node.drop('http://a'), true)
    const next = b.node.connect(endpoint)
    await dropped
    t.equal((await next).engineId, 'http://a')
    const { name, blocks } = a.offer(2)
    const localBlocks = b.feature.allocate(2) as number[]
    await b.node.pull({ ...name, pool: 'feature', remoteBlocks: blocks, localBlocks })
    t.ok(b.holds(localBlocks))
    await b.node.drop('http://a')
  }
  const dropped = t.rejects(b.node.connect(endpoint), { code: 'GONE' })
  Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 200)
  await b.node.drop('http://a')
  await dropped
  t.equal(b.node.peer('http://a'), undefined)
})

t.test('an aborted waiter does not fail the others of a flight', async (t) => {
  const { a, b } = await pair(t)
  const gone = b.node.connect(a.node.endpoint, { signal: AbortSignal.abort() })
  const other = b.node.connect(a.node.endpoint)
  await t.rejects(gone, { code: 'ABORTED' })
  t.equal((await other).engineId, 'http://a')
})

t.test('engines that do not fit are refused with the reason', async (t) => {
  const { a, b } = await pair(t)
  const { endpoint } = a.node
  const feature = endpoint.pools.feature as NonNullable<P2PEndpointInfo['pools']['feature']>
  const cases: Array<[Partial<P2PEndpointInfo>, RegExp]> = [
    [{ fingerprint: 'other' }, /another model/],
    [{ curve: keys.publicKey }, /requires CURVE keys/],
    [{ pools: {} }, /no kind of block in common/],
    [{ pools: { feature: { ...feature, dtype: 'float16' } } }, /feature blocks differ: dtype is float16 there, float32 here/],
    [{ pools: { feature: { ...feature, block_bytes: 1 } } }, /block_bytes is 1 there/]
  ]
  for (const [change, message] of cases) await t.rejects(b.node.connect({ ...endpoint, ...change }), { code: 'REFUSED', message })
  t.throws(() => parseEndpoint({ ...endpoint, v: 2 }), { code: 'REFUSED', message: /version 2/ })
  t.throws(() => parseEndpoint('{'), { code: 'REFUSED' })
  t.throws(() => parseEndpoint(JSON.stringify({ ...endpoint, tcp: 'http://x' })), { message: /tcp:\/\/host:port/ })
  t.throws(() => parseEndpoint({ ...endpoint, epoch: 'x' }), { message: /epoch/ })
  t.throws(() => parseEndpoint({ ...endpoint, engine: 4 }), { message: /engine/ })
  t.throws(() => parseEndpoint({ ...endpoint, ipc: 4 }), { message: /ipc/ })
  t.throws(() => parseEndpoint({ ...endpoint, pools: 4 }), { message: /pools/ })
  t.same(parseEndpoint(JSON.stringify(endpoint)), endpoint)
})

t.test('a peer without the right key is refused, and soon', async (t) => {
  const warnings: string[] = []
  const log = { debug: () => {}, error: () => {}, warn: (_: object, message: string) => warnings.push(message) }
  const a = await Peer.open('http://a', { ipc: false, curve: keys, allowedPeers: [keys.publicKey], log })
  t.teardown(() => a.close())
  const plain = await Peer.open('http://plain', { ipc: false })
  t.teardown(() => plain.close())
  const b = await Peer.open('http://b', { ipc: false, curve: stranger, allowedPeers: [keys.publicKey, other.publicKey] })
  t.teardown(() => b.close())
  const { endpoint } = a.node
  await t.rejects(b.node.connect(endpoint), { code: 'REFUSED', message: /does not accept this engine's CURVE key/ })
  await until(() => warnings.length > 0, 'the other side says why')
  t.match(warnings, [/unknown CURVE key/])
  await t.rejects(b.node.connect({ ...endpoint, curve: other.publicKey }), { code: 'REFUSED', message: /security mechanism, is another one/ })
  await t.rejects(b.node.connect({ ...endpoint, curve: unknown.publicKey }), { code: 'REFUSED', message: /not among the allowed peers/ })
  await t.rejects(plain.node.connect({ ...endpoint, curve: null }), { code: 'REFUSED', message: /security mechanism/ })
  await t.rejects(b.node.connect({ ...plain.node.endpoint, curve: keys.publicKey }), { code: 'REFUSED', message: /security mechanism/ })
})

t.test('an address with no listener, or with another one, fails without hanging', async (t) => {
  const { a, b } = await pair(t, { ipc: false })
  const { endpoint } = a.node
  await t.rejects(b.node.connect({ ...endpoint, engine: 'http://c', tcp: 'tcp://127.0.0.1:1' }), { code: 'GONE', message: /no process listens/ })
  await t.rejects(b.node.connect({ ...endpoint, epoch: 5 }), { code: 'STALE' })
  await t.rejects(b.node.connect({ ...endpoint, tcp: 'tcp://127.0.0.1:1' }, { timeoutMs: 50 }), { code: 'TIMEOUT' })
  t.same(b.node.peers(), [])
})

t.test('a pull names local blocks that fit', async (t) => {
  const { a, b } = await pair(t)
  await b.node.connect(a.node.endpoint)
  const { name, blocks } = a.offer(2)
  const localBlocks = b.feature.allocate(2) as number[]
  const pull = { ...name, pool: 'feature' as const, remoteBlocks: blocks, localBlocks }
  await t.rejects(b.node.pull({ ...pull, localBlocks: [1] }), RangeError)
  await t.rejects(b.node.pull({ ...pull, localBlocks: [500, 501] }), RangeError, 'blocks that are not allocated')
  await t.rejects(b.node.pull({ ...pull, bytes: 3 * b.feature.blockBytes }), RangeError)
  await t.rejects(b.node.pull({ ...pull, remoteBlocks: [blocks[0] as number, 900] }), { code: 'REFUSED' }, 'a block that is not leased')
  await t.rejects(b.node.pull({ ...pull, pool: 'kv', localBlocks: b.kv.allocate(2) as number[] }), { code: 'REFUSED' }, 'the wrong pool')
  await t.rejects(b.node.pull({ ...pull, lease: 'beef' }), { code: 'GONE' })
  await b.node.pull(pull)
  t.ok(b.holds(localBlocks))
})

t.test('options that make no sense are named, and an address in use is an error', async (t) => {
  const { a } = await pair(t)
  const pool = new BlockPool({ name: 'feature', numBlocks: 1, blockBytes: 8 })
  const base = { engineId: 'x', epoch: 1, leases: a.leases, fingerprint: '', pools: { feature: { pool, shape: { block_tokens: 1, hidden_size: 2, dtype: 'float32' as const } } } }
  const { TMPDIR: previous } = process.env
  const own = mkdtempSync(join(tmpdir(), 'own-'))
  t.teardown(() => {
    if (previous === undefined) delete process.env.TMPDIR
    else process.env.TMPDIR = previous
    rmSync(own, { recursive: true })
  })
  process.env.TMPDIR = own
  await t.rejects(P2PNode.open({ ...base, chunkBytes: 1 }), /chunkBytes/)
  await t.rejects(P2PNode.open({ ...base, window: 0 }), /window/)
  await t.rejects(P2PNode.open({ ...base, allowedPeers: [] }), /allowedPeers/)
  const port = Number(new URL(a.node.endpoint.tcp).port)
  await t.rejects(P2PNode.open({ ...base, port }), { code: 'CLOSED', message: /Address already in use/ })
  t.same(readdirSync(own), [], 'an attempt that failed leaves no directory')
  const wide = await P2PNode.open({ ...base, host: '0.0.0.0', advertiseHost: 'node7.example' })
  t.teardown(() => wide.close())
  t.match(wide.endpoint.tcp, /^tcp:\/\/node7\.example:\d+$/)
  for (const [engineId, name] of [['http://node8.example:23333', 'node8.example'], ['http://[2001:db8::8]:23333', '[2001:db8::8]'], ['http://0.0.0.0:23333', hostname()], ['no URL', hostname()]] as const) {
    const node = await P2PNode.open({ ...base, engineId, host: '0.0.0.0' })
    t.teardown(() => node.close())
    t.equal(node.endpoint.tcp.replace(/:\d+$/, ''), `tcp://${name}`, 'a wildcard can not be dialled: the name in the engine\'s URL is')
  }
})

t.test('the ipc socket lies in a private directory, which is gone after close', async (t) => {
  const { a, b } = await pair(t)
  const dir = dirname((a.node.endpoint.ipc as string).slice('ipc://'.length))
  t.equal(statSync(dir).mode & 0o777, 0o700)
  await b.node.connect(a.node.endpoint)
  await a.close()
  t.notOk(existsSync(dir))
  await a.close()
  await t.rejects(async () => a.node.connect(b.node.endpoint), { code: 'CLOSED' })
  await t.rejects(a.node.release({ engineId: 'http://b', epoch: 2, lease: '' }), { code: 'CLOSED' })
})

t.test('files of a killed engine are removed from the temporary directory, those of a living one are not', async (t) => {
  const a = await Peer.open('http://a')
  t.teardown(() => a.close())
  const victim = await EngineProcess.start('http://b')
  const [alive, dead] = [a.node.endpoint, victim.endpoint].map(({ ipc }) => dirname((ipc as string).slice('ipc://'.length))) as [string, string]
  await victim.kill()
  await sweepIpcDirs(dirname(dead))
  t.ok(existsSync(dead), 'too young')
  await sweepIpcDirs(dirname(dead), 0)
  t.notOk(existsSync(dead))
  t.ok(existsSync(alive))
  await sweepIpcDirs('/does/not/exist', 0)
})

t.test('opening, linking, pulling and closing leaks no file descriptor', { skip: !existsSync('/proc/self/fd') }, async (t) => {
  const cycle = async (curve: boolean): Promise<void> => {
    const options = curve ? { ipc: false, curve: keys } : {}
    const [a, b] = await Promise.all([Peer.open('http://a', options), Peer.open('http://b', options)])
    await b.node.connect(a.node.endpoint)
    const { name, blocks } = a.offer(8)
    await b.node.pull({ ...name, pool: 'feature', remoteBlocks: blocks, localBlocks: b.feature.allocate(8) as number[] })
    await Promise.all([a.close(), b.close()])
  }
  const open = (): number => readdirSync('/proc/self/fd').length
  await cycle(true)
  await cycle(false)
  const before = open()
  for (let round = 0; round < (process.env.EPD_TEST_FULL === '1' ? 25 : 5); round++) await cycle(round % 2 === 0)
  await until(() => open() <= before, `no more than ${before} descriptors are open`)
})
