import t from 'tap'
import { until } from '../helper/until.ts'
import { BLOCK_BYTES, Peer, type PeerOptions } from './peer.ts'

const LARGE = (8 << 20) / BLOCK_BYTES

async function linked (t: { teardown: (fn: () => Promise<void>) => void }, options: PeerOptions = {}): Promise<{ a: Peer, b: Peer }> {
  const [a, b] = await Promise.all(['http://a', 'http://b'].map((id) => Peer.open(id, { blocks: 2048, chunkBytes: 64 << 10, ...options }))) as [Peer, Peer]
  t.teardown(() => a.close())
  t.teardown(() => b.close())
  await b.node.connect(a.node.endpoint)
  return { a, b }
}

t.test('ACK ends a lease once; a second one, or a release, does nothing', async (t) => {
  const { a, b } = await linked(t)
  const offer = a.offer(3)
  const answers = await Promise.all([b.node.ack(offer.name), b.node.ack(offer.name), b.node.release(offer.name)])
  t.same(answers, [{ ended: true }, { ended: false }, { ended: false }])
  t.same(offer.ends, ['ack'])
  t.equal(a.leases.end(offer.lease.id, 'release'), false)
  t.ok(a.idle)
})

t.test('an ACK after expiry does nothing, a pull after it is GONE', async (t) => {
  const { a, b } = await linked(t)
  const offer = a.offer(3, { ttlMs: 20 })
  await until(() => offer.ends.length > 0, 'the lease expires')
  t.ok(a.idle)
  t.same(await b.node.ack(offer.name), { ended: false })
  const localBlocks = b.feature.allocate(3) as number[]
  await t.rejects(b.node.pull({ ...offer.name, pool: 'feature', remoteBlocks: offer.blocks, localBlocks }), { code: 'GONE' })
  t.same(offer.ends, ['expired'])
})

for (const how of ['release', 'expired'] as const) {
  t.test(`a lease that ends (${how}) while it is pulled keeps its blocks until the pull is over`, async (t) => {
    const { a, b } = await linked(t, { window: 1 })
    const offer = a.offer(LARGE, { ttlMs: 60_000 })
    const localBlocks = b.feature.allocate(LARGE) as number[]
    const begun = a.leases.beginPull(offer.lease.id, 1)
    const pull = b.node.pull({ ...offer.name, pool: 'feature', remoteBlocks: offer.blocks, localBlocks })
    if (typeof begun === 'string') return t.fail(begun)
    // The worker asks before it sends the first byte; from then on the blocks are read.
    await until(() => b.feature.bytes(localBlocks[0] as number)[5] !== 0, 'the first chunk is there')
    t.equal(a.leases.end(offer.lease.id, how), true)
    a.leases.endPull(begun)
    t.same(offer.ends, [], 'blocks are still read')
    t.equal(a.leases.openCount, 1)
    await pull
    t.ok(b.holds(localBlocks))
    await until(() => offer.ends.length > 0, 'the blocks are given back')
    t.same(offer.ends, [how])
    t.equal(a.feature.free, a.feature.total)
    t.match(a.served, [{ outcome: 'done', blocks: LARGE, bytes: LARGE * BLOCK_BYTES, engine: 'http://b' }])
  })
}

t.test('a running pull keeps its lease from expiring', async (t) => {
  const { a, b } = await linked(t, { window: 1 })
  const offer = a.offer(LARGE, { ttlMs: 30 })
  const localBlocks = b.feature.allocate(LARGE) as number[]
  const ticket = a.leases.beginPull(offer.lease.id, 1)
  const startedAt = performance.now()
  await b.node.pull({ ...offer.name, pool: 'feature', remoteBlocks: offer.blocks, localBlocks })
  await until(() => performance.now() - startedAt > 60, 'the time of the lease has long passed')
  t.same(offer.ends, [])
  if (typeof ticket !== 'string') a.leases.endPull(ticket)
  await until(() => offer.ends.length > 0, 'the lease expires')
  t.same(offer.ends, ['expired'])
  t.ok(b.holds(localBlocks))
})

t.test('many consumers pull, ACK and release at once, and nothing is left', async (t) => {
  const { a, b } = await linked(t)
  const c = await Peer.open('http://c', { ipc: false, blocks: 2048 })
  t.teardown(() => c.close())
  await c.node.connect(a.node.endpoint)
  const count = process.env.EPD_TEST_FULL === '1' ? 500 : 50
  let whole = 0
  await Promise.all(Array.from({ length: count }, async (_, seed) => {
    const to = seed % 2 === 0 ? b : c
    const offer = a.offer(1 + seed % 6, { seed })
    const localBlocks = to.feature.allocate(offer.blocks.length) as number[]
    const signal = seed % 5 === 0 ? AbortSignal.timeout(seed % 10) : undefined
    try {
      await to.node.pull({ ...offer.name, pool: 'feature', remoteBlocks: offer.blocks, localBlocks, signal })
      if (!to.holds(localBlocks, seed)) t.fail(`transfer ${seed} differs`)
      whole++
      await to.node.ack(offer.name)
    } catch (err) {
      if ((err as { code: string }).code !== 'ABORTED') throw err
      await to.node.release(offer.name)
    } finally {
      to.feature.release(localBlocks)
    }
  }))
  await until(() => a.idle && b.idle && c.idle, 'all blocks are free and no lease is open')
  t.ok(whole >= count / 2, `${whole} of ${count} were not aborted`)
  t.ok(a.served.filter(({ outcome }) => outcome === 'done').length >= whole, 'the producer knows of each')
  a.feature.checkIntegrity()
})
