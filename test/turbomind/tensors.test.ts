import t from 'tap'
import { ROOT_CONTEXT } from '@opentelemetry/api'
import { BlockPool, FeatureCache } from '../../engines/cache/index.ts'
import type { MigrationPath } from '../../engines/llm/migration/migration-loop.ts'
import type { SequenceInit } from '../../engines/llm/sequence/sequence.ts'
import { EngineCounters } from '../../engines/service/engine-service.ts'
import { EmbeddingTable } from '../../engines/turbomind/input-embeddings.ts'
import { SlotScheduler } from '../../engines/turbomind/slot-scheduler.ts'
import { SlotTable } from '../../engines/turbomind/slot-table.ts'
import { TurbomindEngine } from '../../engines/turbomind/turbomind-engine.ts'
import { log } from '../llm/harness.ts'

t.test('the choices of a request share one copy of its features', async t => {
  const hiddenSize = 4
  const features = new FeatureCache(new BlockPool({ name: 'feature', numBlocks: 2, blockBytes: 64 * hiddenSize * 4 }))
  const tensors: unknown[] = []
  class Watched extends EmbeddingTable {
    override put (...args: Parameters<EmbeddingTable['put']>): void {
      tensors.push(args[1])
      super.put(...args)
    }
  }
  // No slot: nothing runs.
  const slots = new SlotTable(new BlockPool({ name: 'kv', numBlocks: 1, blockBytes: 8 }), { keep: false })
  const engine = new TurbomindEngine({
    scheduler: new SlotScheduler(slots, { sessionLen: 100, maxBatchSize: 0, maxPrefillTokens: 10 }),
    runner: { prefill: () => t.fail() as never, decode: () => t.fail() as never, reset: () => {} },
    features,
    path: { settled: async () => {} } as MigrationPath,
    counters: new EngineCounters(),
    log,
    maxPositions: 100,
    embeddings: new Watched(hiddenSize),
    hiddenSize,
    dtype: 'float32'
  })
  const entry = features.reserve('h', 1, { numTokens: 3 })!
  features.commit(entry)
  for (let i = 0; i < 4; i++) {
    features.ref(entry)
    engine.submit({
      id: i,
      requestId: 'r',
      tokens: [1, 2, 3, 4],
      positions: { axes: 1, values: new Int32Array(4), next: 4 },
      spans: [],
      media: [{ contentHash: 'h', numTokens: 3, grid: [], features: entry }],
      cacheSalt: '',
      sampling: {} as SequenceInit['sampling'],
      maxTokens: 1,
      context: ROOT_CONTEXT,
      sink: { onToken: () => false, onEnd: () => {} }
    })
  }
  t.equal(tensors.length, 4)
  t.equal(new Set(tensors).size, 1)
  t.equal(features.stats.referenced, 0, 'the blocks are free meanwhile')
  await engine.close()
})
