import t from 'tap'
import { ROOT_CONTEXT } from '@opentelemetry/api'
import { BlockPool } from '../../engines/cache/index.ts'
import { GREEDY } from '../../engines/llm/sequence/sampling.ts'
import { Sequence, type SequenceInit } from '../../engines/llm/sequence/sequence.ts'
import { finish, interrupt, lock, unlock } from '../../engines/llm/sequence/states.ts'
import { EmbeddingTable, newTensor } from '../../engines/turbomind/input-embeddings.ts'
import { SlotScheduler, type SlotSchedulerOptions } from '../../engines/turbomind/slot-scheduler.ts'
import { SlotTable } from '../../engines/turbomind/slot-table.ts'

let lastId = 0

function sequence (prompt: readonly number[], init: Partial<SequenceInit> = {}): Sequence {
  return new Sequence({
    id: ++lastId,
    requestId: 'r',
    tokens: prompt,
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

const count = (from: number, to: number): number[] => Array.from({ length: to - from }, (_, i) => from + i)

function scheduler (slots: number, { keep = true, ...options }: Partial<SlotSchedulerOptions> & { keep?: boolean } = {}): SlotScheduler {
  const pool = new BlockPool({ name: 'kv', numBlocks: slots, blockBytes: 8 })
  return new SlotScheduler(new SlotTable(pool, { keep }), { sessionLen: 1000, maxBatchSize: slots, maxPrefillTokens: 16, ...options })
}

/** Carries out one plan: every decoded sequence gets token 7. Says what the step computed. */
function step (s: SlotScheduler): string | undefined {
  const plan = s.schedule()
  s.checkIntegrity()
  if (plan === undefined) return undefined
  if (plan.kind === 'prefill') {
    for (const chunk of plan.chunks) {
      lock(chunk.sequence)
      unlock(chunk.sequence)
      s.prefilled(chunk)
    }
    return 'prefill ' + plan.chunks.map(({ sequence: { id }, start, count }) => `${id}:${start}+${count}`).join(' ')
  }
  for (const one of plan.sequences) {
    lock(one)
    unlock(one)
    s.decoded(one, 7)
  }
  return 'decode ' + plan.sequences.map(({ id }) => id).join(' ')
}

function stop (s: SlotScheduler, one: Sequence): void {
  finish(one, { kind: 'stop', reason: 'eos' })
  s.remove(one)
}

/** Runs a sequence until it has generated so many tokens, and ends it. */
function run (s: SlotScheduler, one: Sequence, tokens = 1): Sequence {
  s.add(one)
  while (one.generated < tokens) step(s)
  stop(s, one)
  return one
}

t.test('sequences join the batch when there is a slot, in order of arrival, and leave it between steps', async t => {
  lastId = 0
  const s = scheduler(2)
  const [a, b, c] = [sequence(count(0, 4)), sequence(count(10, 14)), sequence(count(20, 24))] as const
  s.add(a)
  t.equal(step(s), 'prefill 1:0+3')
  s.add(c)
  s.add(b)
  t.equal(step(s), 'decode 1', 'prefill and decode alternate')
  t.equal(step(s), 'prefill 2:0+3', 'the one that came first, though it was ready last')
  t.equal(step(s), 'decode 1 2')
  t.same([a.blocks, b.blocks, c.blocks], [[0], [1], []])
  stop(s, a)
  t.equal(step(s), 'prefill 3:0+3')
  t.same(c.blocks, [0], 'in the slot that was left')
  interrupt(b, { kind: 'stopped', error: new Error('cancelled') })
  s.remove(b)
  t.equal(step(s), 'decode 3')
  stop(s, c)
  t.equal(step(s), undefined)
  t.same(s.stats, { total: 2, free: 0, cached: 2 })
  s.clear()
  t.same(s.stats, { total: 2, free: 2, cached: 0 })
})

t.test('a long prompt is prefilled in chunks of max_prefill_token_num, and those that decode go on in between', async t => {
  lastId = 0
  const s = scheduler(3, { maxPrefillTokens: 10 })
  const short = sequence(count(0, 3))
  s.add(short)
  step(s)
  s.add(sequence(count(100, 125)))
  t.same(count(0, 7).map(() => step(s)), ['decode 1', 'prefill 2:0+10', 'decode 1', 'prefill 2:10+10', 'decode 1', 'prefill 2:20+4', 'decode 1 2'])
})

t.test('at most max_batch_size run; further slots keep idle sessions', async t => {
  const s = scheduler(3, { maxBatchSize: 1 })
  const [a, b] = [sequence(count(0, 4)), sequence(count(10, 14))]
  s.add(a)
  s.add(b)
  step(s)
  t.same([s.running.length, s.waiting.length], [1, 1])
  stop(s, a)
  while (b.generated < 1) step(s)
  stop(s, b)
  t.same(s.stats, { total: 3, free: 1, cached: 2 })
})

t.test('an idle slot keeps its keys and values: the next turn of the conversation computes only what is new', async t => {
  const s = scheduler(2)
  const first = run(s, sequence(count(0, 20)), 3)
  t.equal(first.cachedTokens, 0)
  const next = sequence([...first.tokens, ...count(50, 55)])
  s.add(next)
  lastId = next.id
  t.equal(step(s), `prefill ${next.id}:22+5`, 'the last token was never computed')
  t.equal(next.cachedTokens, 22)
  t.same(next.blocks, [0])
  while (next.generated < 1) step(s)
  stop(s, next)
  const same = sequence(count(0, 20))
  run(s, same)
  t.equal(same.cachedTokens, 19, 'all but the last token, which a step has to compute')
  t.same(s.stats, { total: 2, free: 1, cached: 1 }, 'a turn takes over the slot of the one before')
})

t.test('a slot is reused for the same media, the same tenant and no less than it would lose', async t => {
  const picture = (hash: string): Partial<SequenceInit> => ({
    spans: [{ item: 0, start: 4, length: 8, offset: 0 }], media: [{ contentHash: hash, numTokens: 8, grid: [] }]
  })
  const prompt = [...count(0, 4), ...count(0, 8).map(() => 99), ...count(20, 28)]
  const cachedAfter = (firstInit: Partial<SequenceInit>, second: Sequence, keep = true): number | undefined => {
    const s = scheduler(3, { keep })
    run(s, sequence(prompt, firstInit))
    return run(s, second).cachedTokens
  }
  t.equal(cachedAfter(picture('a'), sequence([...prompt, 1], picture('a'))), 20)
  t.equal(cachedAfter(picture('a'), sequence([...prompt, 1], picture('b'))), 0, 'the four tokens before the picture are not worth sixteen after it')
  t.equal(cachedAfter(picture('a'), sequence([...prompt, 1])), 0, 'text that looks like the picture is not the picture')
  t.equal(cachedAfter(picture('a'), sequence([...prompt.slice(0, 12), ...count(40, 60)], picture('a'))), 12, 'another question about the same picture')
  t.equal(cachedAfter({}, sequence([...prompt, 1], { cacheSalt: 'tenant:x' })), 0)
  t.equal(cachedAfter({}, sequence([...prompt, 1]), false), 0, 'nothing is kept when keeping is off')
})

t.test('when every slot keeps something the one used least recently is given away', async t => {
  const s = scheduler(2)
  const a = run(s, sequence(count(0, 20)))
  const b = run(s, sequence(count(100, 120)))
  const again = run(s, sequence([...a.tokens, 5]))
  t.ok((again.cachedTokens ?? 0) > 0, 'a was used again, so b is the older one')
  run(s, sequence(count(200, 220)))
  t.equal(s.evictions, 1)
  t.equal(run(s, sequence([...b.tokens, 6])).cachedTokens, 0, 'b is gone')
  t.equal(s.evictions, 2)
})

t.test('what a failed step may have left is not relied on', async t => {
  const s = scheduler(1)
  const broken = sequence(count(0, 20))
  s.add(broken)
  step(s)
  interrupt(broken, { kind: 'aborted', error: new Error('failed') })
  s.remove(broken)
  t.same(s.stats, { total: 1, free: 1, cached: 0 })
  const cancelled = sequence(count(0, 20))
  s.add(cancelled)
  step(s)
  interrupt(cancelled, { kind: 'stopped', error: new Error('cancelled') })
  s.remove(cancelled)
  t.equal(run(s, sequence(count(0, 20))).cachedTokens, 16, 'a cancelled one leaves the chunks that were computed')
})

t.test('any order of arrivals and cancellations: no request waits for ever, and no slot leaks', async t => {
  let random = 4711
  const below = (n: number): number => { random = (Math.imul(random, 1103515245) + 12345) >>> 0; return (random >>> 8) % n }
  for (let round = 0; round < 20; round++) {
    const s = scheduler(1 + below(4), { maxBatchSize: 1 + below(4), maxPrefillTokens: 1 + below(20) })
    const all = Array.from({ length: 30 }, () => sequence([...count(0, below(3) * 10), ...count(below(5) * 100, below(5) * 100 + 200).slice(0, 2 + below(40))], { maxTokens: 1 + below(6) }))
    const live = new Set<Sequence>()
    for (let at = 0, steps = 0; at < all.length || live.size > 0; steps++) {
      if (steps > 5000) throw new Error('it never ends')
      for (let n = below(4); n > 0 && at < all.length; n--) {
        const one = all[at++] as Sequence
        live.add(one)
        s.add(one)
      }
      step(s)
      for (const one of live) {
        if (one.generated >= one.maxTokens) stop(s, one)
        else if (below(40) === 0) interrupt(one, { kind: below(2) === 0 ? 'stopped' : 'aborted', error: new Error() })
        else continue
        if (one.state !== 'ENDED') s.remove(one)
        live.delete(one)
      }
      s.checkIntegrity()
    }
    t.equal(s.stats.free + s.stats.cached, s.stats.total)
    s.clear()
    t.equal(s.stats.free, s.stats.total)
  }
})

t.test('embeddings are named by ranges of token positions, and a chunk gets its part of them', async t => {
  const table = new EmbeddingTable(2)
  const media = [5, 3].map((numTokens, i) => ({ contentHash: String(i), numTokens, grid: [] }))
  const one = sequence(count(0, 20), { media, spans: [{ item: 0, start: 2, length: 3, offset: 0 }, { item: 0, start: 7, length: 2, offset: 3 }, { item: 1, start: 10, length: 3, offset: 0 }] })
  t.throws(() => table.inputsOf(one), /item 0 are not here/)
  for (const item of media) {
    const tensor = newTensor(item.numTokens, 2, 'float32')
    tensor.set(count(0, item.numTokens * 2).map(n => n + 100 * Number(item.contentHash)))
    table.put(item, tensor)
  }
  t.throws(() => table.put(media[0]!, newTensor(4, 2, 'float32')), /5 tokens take 10 numbers, not 8/)
  const { input_embeddings: tensors, input_embedding_ranges: ranges } = table.inputsOf(one)
  t.same(ranges, [[2, 5], [7, 9], [10, 13]])
  t.same(tensors.map(tensor => [...tensor]), [count(0, 6), count(6, 10), count(100, 106)])
  t.same(table.featuresOf({ sequence: one, start: 3, count: 5 }).map(({ at, rows, offset }) => [at, rows, offset]), [[0, 2, 1], [4, 1, 0]])
  t.same(table.featuresOf({ sequence: one, start: 13, count: 7 }), [])
  t.same(newTensor(2, 4, 'float16').byteLength, 16)
})
