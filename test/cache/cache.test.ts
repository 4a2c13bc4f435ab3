import t from 'tap'
import { BlockPool, CacheError, FeatureCache, type FeatureEntry } from '../../engines/cache/index.ts'
import { seeded } from '../helper/random.ts'

const full = process.env.EPD_TEST_FULL === '1'
const META = { numTokens: 1, grid: [1, 1] }

function cacheOf (numBlocks: number, maxWaiting?: number): FeatureCache {
  return new FeatureCache(new BlockPool({ name: 'feature', numBlocks, blockBytes: 8 }), maxWaiting === undefined ? {} : { maxWaiting })
}

/** A committed entry without holders. */
function keep (cache: FeatureCache, hash: string, blocks: number): FeatureEntry {
  const entry = cache.reserve(hash, blocks, META) as FeatureEntry
  cache.commit(entry)
  return entry
}

t.test('blocks of a pool are given whole or not at all, and a double free is an error that frees nothing', async (t) => {
  const pool = new BlockPool({ name: 'kv', numBlocks: 4, blockBytes: 16 })
  t.equal(pool.sab.byteLength, 64)
  t.same(pool.allocate(3), [0, 1, 2])
  t.equal(pool.allocate(2), undefined)
  t.throws(() => pool.release([0, 0]), /block 0 is not allocated/)
  t.throws(() => pool.release([1, 3]), /block 3 is not allocated/)
  t.equal(pool.free, 1)
  pool.release([1])
  t.same(pool.allocate(1), [1], 'the block freed last, still warm, is taken first')
  pool.bytes(2).fill(9)
  t.equal(new Uint8Array(pool.sab)[32], 9)
  t.throws(() => pool.allocate(-1), RangeError)
  t.throws(() => pool.bytes(4), RangeError)
  t.throws(() => new BlockPool({ name: 'kv', numBlocks: 0, blockBytes: 16 }), /numBlocks/)
  t.throws(() => new BlockPool({ name: 'kv', numBlocks: 1, blockBytes: 12 }), /multiple of 8/)
  t.ok(pool.isAllocated(2))
  t.notOk(pool.isAllocated(3))
  pool.checkIntegrity()
})

t.test('a pool keeps its books under any order of calls', async (t) => {
  for (let seed = 1; seed <= (full ? 200 : 20); seed++) {
    const random = seeded(seed)
    const pool = new BlockPool({ name: 'feature', numBlocks: 1 + random(40), blockBytes: 8 })
    const held: number[][] = []
    for (let step = 0; step < 200; step++) {
      if (random(2) === 0) {
        const count = random(12)
        const before = pool.free
        const ids = pool.allocate(count)
        if ((ids === undefined) !== (count > before)) t.fail(`seed ${seed}: ${count} of ${before} free blocks`)
        if (ids !== undefined) held.push(ids)
      } else if (held.length > 0) {
        pool.release(held.splice(random(held.length), 1)[0] as number[])
      }
      const all = held.flat()
      if (new Set(all).size !== all.length || all.length + pool.free !== pool.total) t.fail(`seed ${seed}: a block was lost or given twice`)
    }
    pool.checkIntegrity()
  }
  t.pass('every seed')
})

t.test('the least recently used entry without holders is evicted first', async (t) => {
  const cache = cacheOf(6)
  const [a, b, c] = [keep(cache, 'a', 2), keep(cache, 'b', 2), keep(cache, 'c', 2)]
  t.equal(cache.lookup('a'), a)
  cache.ref(c)
  t.same(cache.stats, { total: 6, free: 0, cached: 4, referenced: 2 })
  const d = cache.reserve('d', 2, { numTokens: 7 }) as FeatureEntry
  t.match(d, { hash: 'd', numTokens: 7, state: 'pending', refs: 0 })
  t.equal(cache.lookup('b'), undefined, 'b went: a was looked up since, c is held')
  t.equal(b.state, 'dead')
  t.ok(cache.lookup('a') && cache.lookup('c'))
  t.equal(cache.reserve('e', 3, META), undefined, 'a pending entry is not evicted')
  t.throws(() => cache.reserve('a', 1, META), /reserved twice/)
  cache.commit(d)
  cache.unref(c)
  t.ok(cache.reserve('e', 6, META))
  cache.checkIntegrity()
})

t.test('holders keep their entry through abandon and clear, and its blocks are free after the last', async (t) => {
  const cache = cacheOf(8)
  const failed = cache.reserve('failed', 2, META) as FeatureEntry
  cache.ref(failed)
  cache.abandon(failed)
  t.equal(cache.lookup('failed'), undefined)
  t.equal(cache.stats.referenced, 2)
  cache.unref(failed)
  t.equal(cache.stats.free, 8)
  const [held, idle, pending] = [keep(cache, 'held', 2), keep(cache, 'idle', 2), cache.reserve('pending', 2, META) as FeatureEntry]
  cache.ref(held)
  cache.clear()
  t.same(cache.stats, { total: 8, free: 4, cached: 0, referenced: 4 }, 'idle blocks are free, others are still in use')
  t.equal(idle.state, 'dead')
  t.equal(cache.lookup('held') ?? cache.lookup('pending'), undefined)
  const again = keep(cache, 'held', 1)
  cache.checkIntegrity()
  cache.unref(held)
  t.equal(cache.lookup('held'), again, 'the same hash, other blocks')
  cache.commit(pending)
  t.same(cache.stats, { total: 8, free: 7, cached: 1, referenced: 0 })
  t.throws(() => cache.unref(held), /more often than held/)
  t.throws(() => cache.ref(held), /after the end/)
  t.throws(() => cache.commit(pending), /filled twice/)
  t.throws(() => cache.abandon(again), /filled twice/)
  cache.checkIntegrity()
})

t.test('those who wait for room are served in order, and newcomers do not overtake them', async (t) => {
  const cache = cacheOf(4)
  const first = cache.reserve('first', 4, META) as FeatureEntry
  const order: string[] = []
  const wait = (hash: string, blocks: number): Promise<FeatureEntry> => {
    const turn = cache.reserveOrWait(hash, blocks, META, { timeoutMs: 5000 })
    turn.then(() => order.push(hash), () => {})
    return turn
  }
  const [large, small] = [wait('large', 3), wait('small', 1)]
  const room = cache.waitForRoom(1, { timeoutMs: 5000 }).then(() => order.push('room'))
  t.equal(cache.waiting, 3)
  cache.ref(first)
  cache.commit(first)
  cache.unref(first)
  const [one, two] = await Promise.all([large, small])
  t.equal(cache.reserve('newcomer', 1, META), undefined)
  t.same(order, ['large', 'small'])
  cache.commit(one)
  cache.commit(two)
  await room
  t.equal(cache.waiting, 0)
  t.ok(cache.reserve('newcomer', 1, META))
  cache.checkIntegrity()
})

t.test('waiting is bounded in time and number, and ends with the signal', async (t) => {
  const cache = cacheOf(2, 2)
  const held = cache.reserve('held', 2, META) as FeatureEntry
  const controller = new AbortController()
  const wait = (hash: string, timeoutMs: number): Promise<FeatureEntry> => cache.reserveOrWait(hash, 1, META, { timeoutMs, signal: controller.signal })
  const [short, long] = [wait('short', 10), wait('long', 5000)]
  await t.rejects(wait('third', 5000), { code: 'BUSY', message: /already wait/ })
  await t.rejects(short, { code: 'BUSY', message: /within 10 ms/ })
  controller.abort(new Error('the client left'))
  await t.rejects(long, { message: 'the client left' })
  await t.rejects(wait('late', 10), { message: 'the client left' })
  await t.rejects(cache.reserveOrWait('huge', 3, META, { timeoutMs: 10 }), { name: 'CacheError', code: 'TOO_LARGE' })
  t.equal(cache.waiting, 0)
  const twice = cache.reserveOrWait('held', 1, META, { timeoutMs: 5000 })
  cache.commit(held)
  await t.rejects(twice, /reserved twice/, 'the hash came to be there')
  t.type(new CacheError('BUSY', ''), Error)
  cache.checkIntegrity()
})

t.test('a waiter that leaves lets the next one through', async (t) => {
  const cache = cacheOf(4)
  const held = keep(cache, 'held', 3)
  cache.ref(held)
  const controller = new AbortController()
  const large = cache.reserveOrWait('large', 4, META, { timeoutMs: 5000, signal: controller.signal })
  const small = cache.reserveOrWait('small', 1, META, { timeoutMs: 5000 })
  controller.abort()
  await t.rejects(large)
  t.equal((await small).hash, 'small')
})

t.test('a cache keeps its books under any order of calls', async (t) => {
  for (let seed = 1; seed <= (full ? 300 : 30); seed++) {
    const random = seeded(seed)
    const cache = cacheOf(8 + random(40))
    const [pending, held]: [FeatureEntry[], FeatureEntry[]] = [[], []]
    const pick = (from: FeatureEntry[]): FeatureEntry | undefined => from.splice(random(from.length || 1), 1)[0]
    const step = [
      () => {
        const hash = `h${random(12)}`
        const found = cache.lookup(hash)
        if (found !== undefined) { cache.ref(found); return held.push(found) }
        const entry = cache.reserve(hash, 1 + random(6), META)
        if (entry !== undefined) pending.push(entry)
      },
      () => { const entry = pick(pending); if (entry !== undefined) cache.commit(entry) },
      () => { const entry = pick(held); if (entry !== undefined) cache.unref(entry) },
      () => { const entry = random(4) === 0 ? pick(pending) : undefined; if (entry !== undefined) cache.abandon(entry) },
      () => { if (random(20) === 0) cache.clear() },
      () => { const entry = pending[0]; if (entry !== undefined) { cache.ref(entry); held.push(entry) } }
    ]
    for (let at = 0; at < 300; at++) {
      step[random(step.length)]?.()
      const { total, free, cached, referenced } = cache.stats
      if (free + cached + referenced !== total) t.fail(`seed ${seed}: ${JSON.stringify(cache.stats)}`)
      cache.checkIntegrity()
      const blocks = [...pending, ...new Set(held)].filter((entry, index, all) => all.indexOf(entry) === index).flatMap((entry) => entry.blocks)
      if (new Set(blocks).size !== blocks.length) t.fail(`seed ${seed}: two entries share a block`)
    }
    for (const entry of pending) cache.commit(entry)
    for (const entry of held) cache.unref(entry)
    t.equal(cache.stats.referenced, 0, `seed ${seed}`)
    cache.clear()
    t.equal(cache.stats.free, cache.stats.total)
  }
})
