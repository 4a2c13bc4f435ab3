import { randomInt } from 'node:crypto'
import { BlockPool, FeatureCache, LeaseTable } from '../cache/index.ts'
import { EngineCounters } from '../service/engine-service.ts'
import type { EngineOptions } from '../service/engine-options.ts'
import { EngineError } from '../service/errors.ts'
import { FEATURE_BLOCK_TOKENS, loadModel, type LoadedModel } from '../models/index.ts'
import type { P2PNodeOptions, P2PPool } from '../p2p/index.ts'
import type { EncoderResultWire } from '../../adapters/wire/results.ts'
import { VERSION } from '../../adapters/wire/version.ts'
import { parseDevice } from '../runtime/index.ts'
import type { LlmRole } from './api/control-fields.ts'
import type { BlockLinkOptions } from './migration/block-link.ts'
import { BlockManager } from './blocks/block-manager.ts'
import { LlmEngine } from './engine.ts'
import { FeatureFetcher } from './migration/feature-fetcher.ts'
import { FeatureMigration } from './migration/feature-migration.ts'
import { KvMigration } from './migration/kv-migration.ts'
import { LlmService } from './api/llm-service.ts'
import type { MigrationPath } from './migration/migration-loop.ts'
import { PullAhead } from './migration/pull-ahead.ts'
import { parseEncoderResult } from './api/encoder-result.ts'
import { bytesOf } from './runner/elements.ts'
import type { Runner } from './runner/runner.ts'
import { kvBlockElements, type RunnerShape } from './runner/shape.ts'
import {
  DEFAULT_KV_BYTES, DEFAULT_MAX_PREFILL_TOKENS, DEFAULT_MAX_QUEUE, featurePool, MIGRATIONS, openP2P, openRuntime, PULL_TIMEOUT_MS, ROOM_TIMEOUT_MS, runnerShape
} from './setup.ts'
import { Scheduler } from './scheduler/scheduler.ts'

export { LlmService, type LlmRuntime } from './api/llm-service.ts'

export const DEFAULT_MAX_BATCH_SIZE = 32
export const DEFAULT_BLOCK_TOKENS = 16

/** Set by tests and measurements only. */
export interface LlmTuning {
  /** Prompt tokens of one prefill step. @default 256 */
  readonly maxPrefillTokens?: number
  /** @default true */
  readonly prefixCaching?: boolean
  readonly roomTimeoutMs?: number
  readonly pullTimeoutMs?: number
}

function kvPool (options: EngineOptions, shape: RunnerShape, model: LoadedModel): BlockPool {
  const blockBytes = kvBlockElements(shape) * bytesOf(shape.dtype)
  const longest = Math.ceil(model.text.maxPositions / shape.blockTokens)
  const numBlocks = options.kvBlocks ?? Math.max(longest, Math.floor(DEFAULT_KV_BYTES / blockBytes))
  return new BlockPool({ name: 'kv', numBlocks, blockBytes })
}

/** A decode engine has no features; its session worker still needs a pool, of one block. */
function featuresOf (options: EngineOptions, model: LoadedModel): FeatureCache {
  return new FeatureCache(featurePool(options.role === 'decode' ? { ...options, featureBlocks: 1 } : options, model))
}

/** What sequences of this role get from other engines: keys and values in a decode engine, features in the others. */
function migrationPath (role: LlmRole, features: FeatureCache, scheduler: Scheduler, link: BlockLinkOptions, sizes: { blockTokens: number, rowBytes: number, roomTimeoutMs: number }): { path: MigrationPath, fetcher?: FeatureFetcher } {
  if (role === 'decode') return { path: new KvMigration({ ...link, ...sizes, reserve: async (sequence, options) => await scheduler.reserve(sequence, options) }) }
  const fetcher = new FeatureFetcher({ ...link, ...sizes, features, blockTokens: FEATURE_BLOCK_TOKENS })
  return { path: new FeatureMigration(fetcher), fetcher }
}

/** @throws EngineError `unsupported` */
function llmRole ({ role }: EngineOptions): LlmRole {
  if (role === 'encoder') throw new EngineError('unsupported', 'a language model engine has no role encoder: use hybrid, prefill or decode')
  return role
}

/**
 * An LLM engine over a model folder, of role hybrid, prefill or decode. Resolves when `info` and `gauges` work; it can
 * generate when its `ready` resolves. With `vision: false`, and always with role decode, it never opens the vision
 * encoder's file, which may be missing.
 * @throws ModelError naming the file that is missing or wrong; EngineError `unsupported` for a role it does not have.
 */
export async function createLlmEngine (given: EngineOptions, tuning: LlmTuning = {}): Promise<LlmService> {
  const role = llmRole(given)
  const options = { ...given, vision: given.vision && role !== 'decode' }
  const { engineId, vision, log, leaseMs } = options
  // Before any socket is open.
  parseDevice(options.device)
  const model = await loadModel(options.modelDir, { vision, decoder: true, name: options.servedModelName })
  const shape = runnerShape(model, options.blockSize ?? DEFAULT_BLOCK_TOKENS)
  const { blockTokens, layers, kvHeads, headDim, dtype, hiddenSize } = shape
  const kv: P2PPool = { pool: kvPool(options, shape, model), shape: { block_tokens: blockTokens, layers, kv_heads: kvHeads, head_dim: headDim, dtype } }
  const features = featuresOf(options, model)
  const feature: P2PPool = { pool: features.pool, shape: { block_tokens: FEATURE_BLOCK_TOKENS, hidden_size: hiddenSize, dtype } }
  const pools: P2PNodeOptions['pools'] = role === 'decode' ? { kv } : { feature, kv }
  const counters = new EngineCounters()
  const leases = new LeaseTable(randomInt(1, 2 ** 47))
  let ahead: PullAhead | undefined
  const p2p = await openP2P(options, model, leases, pools, offer => { ahead?.take(offer) })
  const maxBatchSize = options.maxBatchSize ?? DEFAULT_MAX_BATCH_SIZE
  const scheduler = new Scheduler(new BlockManager(kv.pool, { caching: tuning.prefixCaching ?? true }), {
    blockTokens, maxBatchSize, maxPrefillTokens: tuning.maxPrefillTokens ?? options.maxPrefillTokens ?? DEFAULT_MAX_PREFILL_TOKENS
  })
  const { roomTimeoutMs = ROOM_TIMEOUT_MS, pullTimeoutMs = PULL_TIMEOUT_MS } = tuning
  const { path, fetcher } = migrationPath(role, features, scheduler, { p2p, counters, log, concurrency: MIGRATIONS, pullTimeoutMs }, { blockTokens, rowBytes: hiddenSize * bytesOf(dtype), roomTimeoutMs })
  if (fetcher !== undefined) {
    const pulls = ahead = new PullAhead({
      p2p,
      fetcher,
      counters,
      log,
      read: offer => parseEncoderResult(offer, model, 'offer'),
      arrived: (media, offer) => {
        const name = (offer as EncoderResultWire).for
        if (typeof name === 'string') service.arrived(name, media)
      }
    })
    features.onShortage = () => { pulls.giveWay() }
  }
  const engine = (runner: Runner): LlmEngine =>
    new LlmEngine({ scheduler, runner, features, path, counters, log, maxPositions: model.text.maxPositions })
  const service = new LlmService({
    engineId,
    role,
    backend: 'pytorch',
    version: VERSION,
    leases,
    leaseMs,
    model,
    vision,
    features,
    staging: false,
    scheduler,
    p2p,
    counters,
    log,
    blockTokens,
    maxLive: maxBatchSize + (options.maxQueue ?? DEFAULT_MAX_QUEUE),
    pullsAhead: fetcher !== undefined,
    info: Object.fromEntries(Object.entries(pools).map(([name, { pool, shape }]) => [name, { ...shape, block_bytes: pool.blockBytes, num_blocks: pool.total }])),
    runtime: openRuntime({ options, model, shape, kv: kv.pool, features, counters, engine })
  })
  return service
}
