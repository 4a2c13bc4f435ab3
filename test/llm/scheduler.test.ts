import t from 'tap'
import { ROOT_CONTEXT } from '@opentelemetry/api'
import { BlockPool } from '../../engines/cache/index.ts'
import { BlockManager } from '../../engines/llm/block-manager.ts'
import { blockHash } from '../../engines/llm/prefix-hash.ts'
import { GREEDY } from '../../engines/llm/sampling-params.ts'
import { Scheduler, type SchedulerOptions } from '../../engines/llm/scheduler.ts'
import { Sequence, type KeptBlocks, type SequenceInit } from '../../engines/llm/sequence.ts'
import { failMigration, finish, finishMigration, interrupt, lock, lockMigration, startMigration, unlock, type SequenceState } from '../../engines/llm/sequence-states.ts'

const BLOCK = 4

let lastId = 0

function sequence (prompt: readonly number[], init: Partial<SequenceInit> = {}, state: SequenceState = 'WAITING'): Sequence {
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
  }, state)
}

/** A sequence that is to bring its keys and values, and `first` as P's token. */
function migrating (prompt: readonly number[], first = 7, init: Partial<SequenceInit> = {}): Sequence {
  const remote = { engineId: 'http://p', epoch: 1, lease: 'l', blocks: [] }
  const migration = { ...remote, tokens: prompt, next: prompt.length, media: [], spans: [], cachedTokens: 0, first: { token: first } }
  const one = sequence(prompt, { migration, ...init }, 'WAITING_MIGRATION')
  startMigration(one)
  return one
}

/** The pull has ended: every block that was not found holds its sequence's id. */
function arrive (s: Scheduler, one: Sequence, found: number): void {
  lockMigration(one)
  for (const block of one.blocks.slice(found)) s.blocks.pool.bytes(block).fill(one.id)
  finishMigration(one)
  s.add(one)
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
  if (plan.kind === 'join') return { kind: 'join', ids: plan.sequences.map(one => one.id), tokens: 0 }
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

t.test('a migrated sequence runs with its prompt computed and P\'s token first; evicted, it is spilled and restored', async t => {
  const s = scheduler(6, { caching: false })
  const [a, b] = [migrating(count(0, 6)), migrating(count(10, 17), 9)]
  for (const one of [a, b]) arrive(s, one, await s.reserve(one, { timeoutMs: 1000 }))
  t.equal(s.size, 2)
  t.same(step(s), { kind: 'join', ids: [a.id, b.id], tokens: 0 })
  t.same([a.tokens.at(-1), a.computed, a.prefillLeft, b.tokens.at(-1)], [7, 6, 0, 9])
  while (s.evictions === 0) t.equal(step(s)?.kind, 'decode')
  t.match(b, { state: 'WAITING', blocks: [], evictions: 1 }, 'the newest')
  const { length } = b
  t.equal(b.spilled?.blocks.length, Math.ceil((length - 1) / BLOCK), 'the blocks in use and no others')
  t.equal(s.stats.spilled, b.spilled?.blocks.length)
  for (const block of count(0, 6)) if (!a.blocks.includes(block)) s.blocks.pool.bytes(block).fill(255)
  finish(a, { kind: 'length' })
  s.remove(a)
  t.same(step(s), { kind: 'decode', ids: [b.id], tokens: 1 }, 'nothing is computed again')
  t.match(b, { length: length + 1, computed: length, spilled: undefined })
  t.ok(b.blocks.slice(0, 2).every(block => s.blocks.pool.bytes(block).every(byte => byte === b.id)), 'its own keys and values')
  t.equal(s.stats.spilled, 0)
  interrupt(b, { kind: 'stopped', error: new Error('cancelled') })
  s.remove(b)
  t.same([s.size, s.blocks.stats.free], [0, 6])
})

t.test('who waits for blocks to migrate into stands in the same line as who waits to run', async t => {
  const s = scheduler(6)
  const running = sequence(count(0, 10))
  s.add(running)
  step(s)
  const claim = migrating(count(100, 112))
  const reserved = s.reserve(claim, { timeoutMs: 1000 })
  const behind = sequence(count(200, 202))
  s.add(behind)
  step(s)
  t.same([s.running.map(one => one.id), s.size], [[running.id], 3], 'nobody overtakes it')
  const stop = new AbortController()
  const given = s.reserve(migrating(count(300, 304)), { timeoutMs: 1000, signal: stop.signal })
  const late = s.reserve(migrating(count(400, 404)), { timeoutMs: 10 })
  stop.abort(new Error('cancelled'))
  await t.rejects(given, /cancelled/)
  await t.rejects(late, { code: 'BUSY' })
  finish(running, { kind: 'length' })
  s.remove(running)
  step(s)
  t.equal(await reserved, 0)
  t.equal(claim.blocks.length, 3)
  t.same(s.running.map(one => one.id), [behind.id], 'what is being pulled holds up nobody')
  lockMigration(claim)
  failMigration(claim, new Error('gone'))
  s.remove(claim)
  s.checkIntegrity()
  t.equal(s.size, 1)
})

t.test('a full batch lets who has arrived wait for a place, first come, first served', async t => {
  const s = scheduler(16, { maxBatchSize: 1 })
  const running = sequence(count(0, 4))
  s.add(running)
  step(s)
  const arrived = migrating(count(100, 108))
  arrive(s, arrived, await s.reserve(arrived, { timeoutMs: 1000 }))
  const younger = sequence(count(200, 204))
  s.add(younger)
  t.equal(step(s)?.kind, 'decode')
  t.equal(arrived.state, 'MIGRATION_DONE')
  finish(running, { kind: 'length' })
  s.remove(running)
  t.same(step(s), { kind: 'join', ids: [arrived.id], tokens: 0 })
  const twin = migrating(count(100, 108))
  const found = s.reserve(twin, { timeoutMs: 1000 })
  t.same(step(s), { kind: 'decode', ids: [arrived.id], tokens: 1 })
  t.equal(await found, 2, 'the same prompt is found, every block of it; who waits for a place does not hold up who waits for blocks')
  t.same(twin.blocks, arrived.blocks.slice(0, 2))
})

t.test('blocks that a sequence is to leave stay until their keeper gives them back, once', async t => {
  const s = scheduler(4)
  let kept: KeptBlocks | undefined
  const keep: SequenceInit['keep'] = (_, blocks) => { kept = blocks }
  const [well, badly] = [sequence(count(0, 6), { keep }), sequence(count(0, 6), { keep })]
  s.add(well)
  step(s)
  step(s)
  const { blocks } = well
  finish(well, { kind: 'length' })
  s.remove(well)
  t.same(kept?.blocks, blocks)
  s.checkIntegrity()
  s.clear()
  t.match(s.stats, { free: 2, cached: 0 })
  kept?.release()
  kept?.release()
  t.equal(s.stats.free, 4)
  kept = undefined
  s.add(badly)
  step(s)
  interrupt(badly, { kind: 'stopped', error: new Error('cancelled') })
  s.remove(badly)
  t.equal(kept, undefined, 'a cancelled one leaves nothing')
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

/** The token that follows these. */
function nextOf (tokens: readonly number[]): number {
  return tokens.reduce((sum, token, i) => (sum * 31 + token + i) % 1009, 7) % 3
}

t.test('whatever arrives, migrates, is cancelled or runs out of room: everybody ends with the same tokens, and nothing leaks', async t => {
  const runs = process.env.EPD_TEST_FULL === '1' ? 300 : 40
  let evictions = 0
  for (let run = 0; run < runs; run++) {
    const rnd = random(run)
    const s = scheduler(8 + rnd(12), { caching: rnd(2) === 0, maxBatchSize: 1 + rnd(6), maxPrefillTokens: 1 + rnd(20) })
    // A third of them migrate, from a P that would have sampled the same.
    const all = Array.from({ length: 12 }, () => {
      const prompt = Array.from({ length: 1 + rnd(18) }, () => rnd(3))
      return { sequence: rnd(3) === 0 ? migrating(prompt, nextOf(prompt)) : sequence(prompt), left: 1 + rnd(12) }
    })
    const pending = [...all]
    const live = new Map<Sequence, { left: number, stop: AbortController }>()
    const next = (one: Sequence): number => nextOf(one.tokens)
    const take = (one: Sequence, signal: AbortSignal): void => {
      if (one.migration === undefined) s.add(one)
      else s.reserve(one, { timeoutMs: 60_000, signal }).then(found => { if (one.state === 'RUNNING_MIGRATION') arrive(s, one, found) }, () => {})
    }
    for (let i = 0; (pending.length > 0 || live.size > 0) && i < 3000; i++) {
      if (pending.length > 0 && rnd(3) === 0) {
        const { sequence: one, left } = pending.shift() as typeof all[number]
        const stop = new AbortController()
        live.set(one, { left, stop })
        take(one, stop.signal)
      }
      await null
      step(s, next)
      for (const [one, { left, stop }] of live) {
        const cancelled = rnd(60) === 0
        if (!cancelled && one.generated < left) continue
        stop.abort()
        if (one.state === 'RUNNING_MIGRATION') failMigration(one, new Error('cancelled'))
        else if (cancelled || one.state !== 'RUNNING') interrupt(one, { kind: 'stopped', error: new Error('cancelled') })
        else finish(one, { kind: 'length' })
        s.remove(one)
        live.delete(one)
      }
      s.checkIntegrity()
    }
    const { total, free, cached } = s.blocks.stats
    evictions += s.evictions
    if (live.size > 0 || s.size > 0 || free + cached !== total) t.fail(`run ${run}: ${live.size} live, ${free} free, ${cached} cached of ${total}`)
    for (const { sequence: one } of all) {
      const expected = one.tokens.slice(0, one.promptLength)
      while (expected.length < one.length) expected.push(nextOf(expected))
      if (expected.join() !== one.tokens.join()) t.fail(`run ${run}: sequence ${one.id} took another course`)
      if (one.spilled !== undefined) t.fail(`run ${run}: sequence ${one.id} has ended, and its copy is still there`)
    }
  }
  t.ok(evictions > runs / 10, `${runs} random runs with ${evictions} evictions`)
})
