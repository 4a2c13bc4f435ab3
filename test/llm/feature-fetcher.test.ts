/** Who holds the blocks of features that come from another engine, and who fills them. */
import { ROOT_CONTEXT } from '@opentelemetry/api'
import t from 'tap'
import { BlockPool } from '../../engines/cache/index.ts'
import { FeatureCache } from '../../engines/cache/feature-cache.ts'
import { FeatureFetcher } from '../../engines/llm/migration/feature-fetcher.ts'
import type { RemoteMedia } from '../../engines/llm/sequence/prompt.ts'
import type { PullOptions, PullResult } from '../../engines/p2p/types.ts'
import { EngineCounters } from '../../engines/service/engine-service.ts'
import { deferred, type Deferred } from '../../engines/service/waiting.ts'
import { log } from './harness.ts'

interface Stand { features: FeatureCache, fetcher: FeatureFetcher, counters: EngineCounters, pulls: Array<Deferred<PullResult> & { options: PullOptions }> }

const DONE: PullResult = { bytes: 16, transport: 'tcp', ms: 1 }

/** Items of one block each; a pull ends when the test says so. */
function stand (numBlocks: number): Stand {
  const features = new FeatureCache(new BlockPool({ name: 'feature', numBlocks, blockBytes: 16 }))
  const counters = new EngineCounters()
  const pulls: Stand['pulls'] = []
  const p2p = {
    pull: async (options: PullOptions) => {
      const pull = deferred<PullResult>()
      pulls.push({ ...pull, options })
      options.signal?.addEventListener('abort', () => { pull.reject(options.signal?.reason) })
      return await pull.promise
    },
    ack: async () => ({ ended: true })
  }
  return { features, counters, pulls, fetcher: new FeatureFetcher({ features, counters, p2p, log, concurrency: 4, pullTimeoutMs: 60_000, rowBytes: 16, blockTokens: 1, roomTimeoutMs: 1 }) }
}

/** Whatever may happen by then has. */
const turn = async (): Promise<void> => { await new Promise(setImmediate) }

const item = (contentHash: string, engineId = 'http://e'): RemoteMedia => ({ contentHash, numTokens: 1, grid: [1, 1], source: { engineId, epoch: 1, lease: 'l', blocks: [0] } })
const call = (): { signal: AbortSignal, context: typeof ROOT_CONTEXT } => ({ signal: new AbortController().signal, context: ROOT_CONTEXT })

/** As the transfer worker does when a chunk arrives. */
function arrive ({ options: { gate } }: Stand['pulls'][number]): void {
  gate!.enter()
  gate!.leave()
}

t.test('an item holds its blocks from its reservation on: when the pull before it fails it fills them, whoever waits for room', async t => {
  const { features, fetcher, counters, pulls } = stand(2)
  const ahead = t.rejects(fetcher.pullAhead(item('x'), call()), /gone/)
  await turn()
  arrive(pulls[0]!)
  const items = [item('x'), item('y')]
  const reserved = items.map(media => fetcher.tryReserve(media)!)
  t.notOk(reserved.includes(undefined!))
  const other = features.reserveOrWait('z', 1, { numTokens: 1 }, { timeoutMs: 60_000 })
  const fetched = items.map(async (media, i) => await fetcher.fetch(media, reserved[i]!, call()))
  await turn()
  pulls[0]!.reject(new Error('gone'))
  await ahead
  await turn()
  t.same(pulls.map(({ options }) => options.localBlocks.length), [1, 1, 1])
  t.same(pulls[2]!.options.localBlocks, pulls[0]!.options.localBlocks, 'into the same blocks')
  for (const pull of pulls) pull.resolve(DONE)
  await Promise.all(fetched)
  for (const { features: entry } of items) features.unref(entry!)
  features.abandon(await other)
  t.same(counters.ahead, { pulled: 0, used: 0, dropped: 0 })
  features.clear()
  features.checkIntegrity()
  t.equal(features.pool.free, 2)
})

t.test('items that want the same features are filled by one pull, and the next takes over from each that fails or leaves', async t => {
  const { features, fetcher, pulls } = stand(1)
  const engines = ['http://a', 'http://b', 'http://c', 'http://d']
  const items = engines.map(engine => item('x', engine))
  const reserved = items.map(media => fetcher.tryReserve(media)!)
  const leaves = new AbortController()
  const outcomes = items.map(async (media, i) => await fetcher.fetch(media, reserved[i]!, i === 1 ? { ...call(), signal: leaves.signal } : call()).then(({ blocks }) => blocks, (err: Error) => err.message))
  await turn()
  leaves.abort(new Error('left'))
  pulls[0]!.reject(new Error('gone'))
  await turn()
  t.same(pulls.map(({ options }) => options.engineId), ['http://a', 'http://c'])
  pulls[1]!.resolve(DONE)
  t.same(await Promise.all(outcomes), ['gone', 'left', 1, 0])
  for (const { features: entry } of items) features.unref(entry!)
  t.equal(features.stats.cached, 1)
})

t.test('what a pull ahead did not bring is not counted as used', async t => {
  const { fetcher, counters, pulls } = stand(1)
  const ahead = t.rejects(fetcher.pullAhead(item('x'), call()), /gone/)
  await turn()
  arrive(pulls[0]!)
  const [first, second] = [item('x'), item('x')]
  const own = fetcher.fetch(first, fetcher.tryReserve(first)!, call())
  await turn()
  pulls[0]!.reject(new Error('gone'))
  await ahead
  await turn()
  pulls[1]!.resolve(DONE)
  t.equal((await own).ahead, undefined)
  t.equal((await fetcher.fetch(second, fetcher.tryReserve(second)!, call())).ahead, undefined)
  t.equal(counters.ahead.used, 0)
})

t.test('a request ends a pull ahead of which nothing has arrived, and waits for one that has begun', async t => {
  for (const begun of [false, true]) {
    const { fetcher, pulls } = stand(1)
    const ahead = fetcher.pullAhead(item('x'), call()).then(() => 'done', (err: Error) => err.message)
    await turn()
    if (begun) arrive(pulls[0]!)
    const media = item('x')
    const fetched = fetcher.fetch(media, fetcher.tryReserve(media)!, call())
    await turn()
    t.equal(pulls.length, begun ? 1 : 2)
    for (const pull of pulls) pull.resolve(DONE)
    t.equal(await ahead, begun ? 'done' : 'its request pulls it')
    t.equal((await fetched).ahead, begun ? true : undefined)
  }
})

t.test('features that nobody is left to fill leave no block behind', async t => {
  const { features, fetcher, pulls } = stand(1)
  const [first, second] = [item('x'), item('x')]
  const reserved = [first, second].map(media => fetcher.tryReserve(media)!)
  const failed = t.rejects(fetcher.fetch(first, reserved[0]!, call()), /gone/)
  await turn()
  fetcher.cancel(reserved[1]!)
  pulls[0]!.reject(new Error('gone'))
  await failed
  features.unref(first.features!)
  t.same(features.stats, { total: 1, free: 1, cached: 0, referenced: 0 })
})
