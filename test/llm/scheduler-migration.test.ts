import t from 'tap'
import type { KeptBlocks, Sequence, SequenceInit } from '../../engines/llm/sequence/sequence.ts'
import { failMigration, finish, interrupt, lockMigration } from '../../engines/llm/sequence/states.ts'
import { seeded } from '../helper/random.ts'
import { arrive, BLOCK, count, migrating, scheduler, sequence, step } from './scheduling.ts'

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
  t.equal(b.spilled?.length, Math.ceil((length - 1) / BLOCK), 'the blocks in use and no others')
  t.equal(s.stats.spilled, b.spilled?.length)
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

t.test('sequences that wait for blocks to migrate into are in one queue with those that wait to run', async t => {
  const s = scheduler(6)
  const running = sequence(count(0, 10))
  s.add(running)
  step(s)
  const claim = migrating(count(100, 112))
  const reserved = s.reserve(claim, { timeoutMs: 1000 })
  const behind = sequence(count(200, 202))
  s.add(behind)
  step(s)
  t.same([s.running.map(one => one.id), s.size], [[running.id], 3], 'no sequence overtakes it')
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
  t.same(s.running.map(one => one.id), [behind.id], 'a running pull delays no other sequence')
  lockMigration(claim)
  failMigration(claim, new Error('gone'))
  s.remove(claim)
  s.checkIntegrity()
  t.equal(s.size, 1)
})

t.test('with a full batch migrated sequences wait for a place, first come, first served', async t => {
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

/** The token that follows these. */
function nextOf (tokens: readonly number[]): number {
  return tokens.reduce((sum, token, i) => (sum * 31 + token + i) % 1009, 7) % 3
}

t.test('whatever arrives, migrates, is cancelled or runs out of room: all end with the same tokens, and nothing leaks', async t => {
  const runs = process.env.EPD_TEST_FULL === '1' ? 300 : 40
  let evictions = 0
  for (let run = 0; run < runs; run++) {
    const rnd = seeded(run)
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
