import t from 'tap'
import { blockHash } from '../../engines/llm/blocks/prefix-hash.ts'
import type { Sequence } from '../../engines/llm/sequence/sequence.ts'
import { finish, interrupt } from '../../engines/llm/sequence/states.ts'
import { count, manager, scheduler, sequence, step } from './scheduling.ts'

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
    spans: [{ item: 0, start: 2, length: 4, offset: 0 }], media: [{ contentHash, numTokens: 4, grid: [] }]
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
  const s = scheduler(5, { caching: false })
  const [a, b] = [sequence(count(0, 4)), sequence(count(10, 15))]
  s.add(a)
  s.add(b)
  while (s.evictions === 0) step(s)
  t.equal(a.evictions, 0)
  t.equal(b.state, 'WAITING')
  t.equal(b.evictions, 1)
  t.same(b.blocks, [])
  finish(a, { kind: 'length' })
  s.remove(a)
  const length = b.length
  t.same(step(s), { kind: 'prefill', ids: [b.id], tokens: length - 1 }, 'recomputed with what it had generated')
  t.same(step(s), { kind: 'decode', ids: [b.id], tokens: 1 })
})

t.test('a prefill that gave way to a decode step goes on when that ends in an eviction', async t => {
  const s = scheduler(17, { maxPrefillTokens: 4 })
  const long = sequence(count(0, 60))
  s.add(long)
  step(s)
  const newest = sequence([99])
  s.add(newest)
  let steps = 0
  while (long.prefillLeft > 0 && steps < 60 && step(s) !== undefined) steps++
  t.ok(s.evictions > 0, 'the newest had to go')
  t.equal(long.prefillLeft, 0, 'and no new request was needed to wake the others')
  s.checkIntegrity()
})

t.test('no sequence overtakes a prompt that waits for room', async t => {
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
