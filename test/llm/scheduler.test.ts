import t from 'tap'
import { ROOT_CONTEXT } from '@opentelemetry/api'
import { BlockPool } from '../../engines/cache/index.ts'
import { BlockManager } from '../../engines/llm/block-manager.ts'
import { blockHash } from '../../engines/llm/prefix-hash.ts'
import { GREEDY } from '../../engines/llm/sampling-params.ts'
import { Scheduler, type SchedulerOptions } from '../../engines/llm/scheduler.ts'
import { Sequence, type SequenceInit } from '../../engines/llm/sequence.ts'
import { finish, interrupt, lock, unlock } from '../../engines/llm/sequence-states.ts'

const BLOCK = 4

let lastId = 0

function sequence (prompt: readonly number[], init: Partial<SequenceInit> = {}): Sequence {
  return new Sequence({
    id: ++lastId,
    requestId: 'r',
    prompt,
    positions: { axes: 1, values: Int32Array.from(prompt.keys()), next: prompt.length },
    spans: [],
    media: [],
    cacheSalt: '',
    sampling: GREEDY,
    maxTokens: 100,
    context: ROOT_CONTEXT,
    sink: { onToken: () => false, onEnd: () => {} },
    ...init
  }, 'WAITING')
}

function count (from: number, to: number): number[] {
  return Array.from({ length: to - from }, (_, i) => from + i)
}

function manager (blocks: number, caching = true): BlockManager {
  return new BlockManager(new BlockPool({ name: 'kv', numBlocks: blocks, blockBytes: 8 }), { caching })
}

function scheduler (blocks: number, options: Partial<SchedulerOptions> & { caching?: boolean } = {}): Scheduler {
  const { caching = true, ...rest } = options
  return new Scheduler(manager(blocks, caching), { blockTokens: BLOCK, maxBatchSize: 8, maxPrefillTokens: 16, ...rest })
}

/** Carries out one plan; every sequence gets the token `next` says. */
function step (s: Scheduler, next: (sequence: Sequence) => number = () => 7): { kind: string, ids: number[], tokens: number } | undefined {
  const plan = s.schedule()
  if (plan === undefined) return undefined
  s.checkIntegrity()
  if (plan.kind === 'prefill') {
    for (const chunk of plan.chunks) {
      lock(chunk.sequence)
      unlock(chunk.sequence)
      s.prefilled(chunk)
    }
    return { kind: 'prefill', ids: plan.chunks.map(c => c.sequence.id), tokens: plan.chunks.reduce((n, c) => n + c.count, 0) }
  }
  for (const one of plan.sequences) {
    lock(one)
    unlock(one)
    s.decoded(one, next(one))
  }
  return { kind: 'decode', ids: plan.sequences.map(one => one.id), tokens: plan.sequences.length }
}

t.test('blocks are shared by hash, kept when unreferenced, and evicted least recently used first', async t => {
  const m = manager(4)
  const [a, b, c] = m.allocate(3) as [number, number, number]
  m.commit(a, 'A')
  m.commit(b, 'B')
  t.same(m.match(['A', 'B', 'C']), { blocks: 2, idle: 0 })
  t.equal(m.acquire('A'), a)
  m.release([a, b, c])
  t.same(m.stats, { total: 4, free: 2, cached: 1 }, 'A is still held once')
  m.release([a])
  t.same(m.stats, { total: 4, free: 2, cached: 2 })
  t.same(m.match(['A', 'B']), { blocks: 2, idle: 2 })
  const taken = m.allocate(3) as number[]
  t.ok(taken.includes(b) && !taken.includes(a), 'B was released first')
  t.same(m.match(['A', 'B']), { blocks: 1, idle: 1 })
  t.equal(m.allocate(2), undefined)
  m.checkIntegrity([taken])
  t.throws(() => m.checkIntegrity([]), /references/)
  m.clear()
  t.same(m.match(['A']), { blocks: 0, idle: 0 })
  m.release(taken)
  t.same(m.stats, { total: 4, free: 4, cached: 0 })
  t.throws(() => m.release(taken), /more often/)
  t.throws(() => m.commit(a, 'X'), /not referenced/)
  t.throws(() => m.acquire('A'), /not cached/)
})

t.test('without caching nothing outlives its last reference', async t => {
  const m = manager(2, false)
  const blocks = m.allocate(1) as number[]
  m.commit(blocks[0] as number, 'A')
  m.release(blocks)
  t.same(m.stats, { total: 2, free: 2, cached: 0 })
})

t.test('a block hash covers what came before, the ids, and what the media are', async t => {
  const span = (contentHash: string): Pick<Sequence, 'spans' | 'media'> => ({
    spans: [{ item: 0, start: 2, length: 4, offset: 0 }], media: [{ contentHash, numTokens: 4, source: undefined, features: undefined }]
  })
  const none = { spans: [], media: [] }
  const tokens = count(0, 8)
  const hash = blockHash('', tokens, 0, 4, none)
  t.equal(blockHash('', [...tokens], 0, 4, none), hash)
  t.not(blockHash('x', tokens, 0, 4, none), hash)
  t.not(blockHash('', tokens, 4, 8, none), hash)
  t.not(blockHash('', tokens, 0, 4, span('A')), blockHash('', tokens, 0, 4, span('B')))
  t.not(blockHash('', tokens, 4, 8, span('A')), blockHash('', tokens, 4, 8, span('B')), 'also where the span began before the block')
  t.equal(blockHash('', count(0, 12), 8, 12, span('A')), blockHash('', count(0, 12), 8, 12, span('B')), 'but not after it')
})

t.test('prompts are prefilled in chunks within the budget, all but the last token, and decode steps come in between', async t => {
  const s = scheduler(32)
  const first = sequence(count(0, 6))
  s.add(first)
  t.same(step(s), { kind: 'prefill', ids: [first.id], tokens: 5 })
  const long = sequence(count(100, 140))
  s.add(long)
  t.same(step(s), { kind: 'decode', ids: [first.id], tokens: 1 })
  t.same(step(s), { kind: 'prefill', ids: [long.id], tokens: 16 })
  t.same(step(s), { kind: 'decode', ids: [first.id], tokens: 1 })
  t.same(step(s), { kind: 'prefill', ids: [long.id], tokens: 16 })
  step(s)
  t.same(step(s), { kind: 'prefill', ids: [long.id], tokens: 7 })
  t.same(step(s), { kind: 'decode', ids: [first.id, long.id], tokens: 2 })
})

t.test('short prompts share a prefill step unless padding would cost much', async t => {
  const s = scheduler(32)
  const [a, b, c] = [sequence(count(0, 6)), sequence(count(10, 16)), sequence(count(20, 22))]
  for (const one of [a, b, c]) s.add(one)
  t.same(step(s)?.ids, [a.id, b.id])
})

t.test('a prefix is computed once: found later, waited for when it is being computed', async t => {
  const s = scheduler(32)
  const prefix = count(0, 12)
  const [a, b] = [sequence([...prefix, 50, 51]), sequence([...prefix, 60, 61])]
  s.add(a)
  s.add(b)
  t.same(step(s), { kind: 'prefill', ids: [a.id], tokens: 13 }, 'the second waits for the first one\'s blocks')
  t.same(step(s)?.kind, 'decode')
  t.same(step(s), { kind: 'prefill', ids: [b.id], tokens: 1 })
  t.equal(b.cachedTokens, 12)
  t.same(a.blocks.slice(0, 3), b.blocks.slice(0, 3))
  const other = sequence([...prefix, 70], { cacheSalt: 'another tenant' })
  s.add(other)
  step(s)
  step(s)
  t.equal(other.cachedTokens, 0, 'tenants share nothing')
})

t.test('when decoding needs a block and none is left, the newest is evicted, and comes back to its place', async t => {
  const evicted: number[] = []
  const s = scheduler(5, { caching: false, onEvict: one => evicted.push(one.id) })
  const [a, b] = [sequence(count(0, 4)), sequence(count(10, 15))]
  s.add(a)
  s.add(b)
  while (evicted.length === 0) step(s)
  t.same(evicted, [b.id])
  t.equal(b.state, 'WAITING')
  t.equal(b.evictions, 1)
  t.same(b.blocks, [])
  finish(a, { kind: 'length' })
  s.remove(a)
  const length = b.length
  t.same(step(s), { kind: 'prefill', ids: [b.id], tokens: length - 1 }, 'recomputed with what it had generated')
  t.same(step(s), { kind: 'decode', ids: [b.id], tokens: 1 })
})

t.test('nobody overtakes a prompt that waits for room', async t => {
  const s = scheduler(6)
  const [a, big, small] = [sequence(count(0, 14)), sequence(count(100, 120)), sequence(count(200, 202))]
  for (const one of [a, big, small]) s.add(one)
  step(s)
  t.same(s.running.map(one => one.id), [a.id])
  interrupt(a, { kind: 'stopped', error: new Error('cancelled') })
  s.remove(a)
  step(s)
  t.ok(s.running.includes(big))
})

/** Deterministic random numbers (mulberry32), so that a failure can be repeated. */
function random (seed: number): (below: number) => number {
  return below => {
    seed = (seed + 0x6d2b79f5) | 0
    let x = Math.imul(seed ^ (seed >>> 15), 1 | seed)
    x = (x + Math.imul(x ^ (x >>> 7), 61 | x)) ^ x
    return ((x ^ (x >>> 14)) >>> 0) % below
  }
}

t.test('whatever arrives, is cancelled or runs out of room: everybody ends with the same tokens, and nothing leaks', async t => {
  const runs = process.env.EPD_TEST_FULL === '1' ? 300 : 40
  for (let run = 0; run < runs; run++) {
    const rnd = random(run)
    const s = scheduler(8 + rnd(12), { caching: rnd(2) === 0, maxBatchSize: 1 + rnd(6), maxPrefillTokens: 1 + rnd(20) })
    const all = Array.from({ length: 12 }, () => ({ sequence: sequence(Array.from({ length: 1 + rnd(18) }, () => rnd(3))), left: 1 + rnd(12) }))
    const pending = [...all]
    const live = new Map<Sequence, number>()
    const next = (one: Sequence): number => one.tokens.reduce((sum, token, i) => (sum * 31 + token + i) % 1009, 7) % 3
    for (let i = 0; (pending.length > 0 || live.size > 0) && i < 3000; i++) {
      if (pending.length > 0 && rnd(3) === 0) {
        const { sequence: one, left } = pending.shift() as typeof all[number]
        live.set(one, left)
        s.add(one)
      }
      step(s, next)
      for (const [one, left] of live) {
        const cancelled = rnd(60) === 0
        if (!cancelled && one.generated < left) continue
        if (cancelled || one.state !== 'RUNNING') interrupt(one, { kind: 'stopped', error: new Error('cancelled') })
        else finish(one, { kind: 'length' })
        s.remove(one)
        live.delete(one)
      }
      s.checkIntegrity()
    }
    const { total, free, cached } = s.blocks.stats
    if (live.size > 0 || free + cached !== total) t.fail(`run ${run}: ${live.size} live, ${free} free, ${cached} cached of ${total}`)
    for (const { sequence: one } of all) {
      const expected = one.tokens.slice(0, one.promptLength)
      while (expected.length < one.length) expected.push(expected.reduce((sum, token, i) => (sum * 31 + token + i) % 1009, 7) % 3)
      if (expected.join() !== one.tokens.join()) t.fail(`run ${run}: sequence ${one.id} took another course`)
    }
  }
  t.pass(`${runs} random runs`)
})
