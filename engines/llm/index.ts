import { randomInt } from 'node:crypto'
import { BlockPool, FeatureCache, LeaseTable } from '../cache/index.ts'
import { EngineCounters } from '../counters.ts'
import type { EngineOptions } from '../engine-options.ts'
import { EngineError } from '../errors.ts'
import { FEATURE_BLOCK_TOKENS, loadModel, type LoadedModel } from '../models/index.ts'
import { packageVersion } from '../package-version.ts'
import { parseDevice } from '../runtime/index.ts'
import { BlockManager } from './block-manager.ts'
import { LlmEngine } from './engine.ts'
import { FeatureFetcher } from './feature-fetcher.ts'
import { LlmService } from './llm-service.ts'
import { bytesOf } from './runner/elements.ts'
import type { Runner } from './runner/runner.ts'
import { kvBlockElements, type RunnerShape } from './runner/shape.ts'
import {
  DEFAULT_KV_BYTES, DEFAULT_MAX_PREFILL_TOKENS, DEFAULT_MAX_QUEUE, featurePool, MIGRATIONS, openP2P, openRuntime, PULL_TIMEOUT_MS, ROOM_TIMEOUT_MS, runnerShape
} from './runtime.ts'
import { Scheduler } from './scheduler.ts'

export { LlmService, type LlmRuntime } from './llm-service.ts'

export const DEFAULT_MAX_BATCH_SIZE = 32
export const DEFAULT_BLOCK_TOKENS = 16

/** What only tests and measurements set. */
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

/**
 * An LLM engine of role hybrid over a model folder. Resolves when it can be asked about; `ready` when it can generate.
 * With `vision: false` the vision encoder's file is never opened and may be missing.
 * @throws ModelError naming the file that is missing or wrong; EngineError `unsupported` for a role it does not have.
 */
export async function createLlmEngine (options: EngineOptions, tuning: LlmTuning = {}): Promise<LlmService> {
  if (options.role !== 'hybrid') throw new EngineError('unsupported', `this engine has no role ${options.role}: use hybrid`)
  // Before any socket is open.
  parseDevice(options.device)
  const model = await loadModel(options.modelDir, { vision: options.vision, decoder: true, name: options.servedModelName })
  const shape = runnerShape(model, options.blockSize ?? DEFAULT_BLOCK_TOKENS)
  const { blockTokens, layers, kvHeads, headDim, dtype, hiddenSize } = shape
  const pools = { kv: kvPool(options, shape, model), feature: featurePool(options, model) }
  const features = new FeatureCache(pools.feature)
  const counters = new EngineCounters()
  const leases = new LeaseTable(randomInt(1, 2 ** 47))
  const shapes = {
    feature: { block_tokens: FEATURE_BLOCK_TOKENS, hidden_size: hiddenSize, dtype },
    kv: { block_tokens: blockTokens, layers, kv_heads: kvHeads, head_dim: headDim, dtype }
  }
  const p2p = await openP2P(options, model, leases, { feature: { pool: pools.feature, shape: shapes.feature }, kv: { pool: pools.kv, shape: shapes.kv } })
  const maxBatchSize = options.maxBatchSize ?? DEFAULT_MAX_BATCH_SIZE
  let forget: Runner['forget'] = () => {}
  const scheduler = new Scheduler(new BlockManager(pools.kv, { caching: tuning.prefixCaching ?? true }), {
    blockTokens, maxBatchSize, maxPrefillTokens: tuning.maxPrefillTokens ?? options.maxPrefillTokens ?? DEFAULT_MAX_PREFILL_TOKENS, onEvict: sequence => forget(sequence)
  })
  const fetcher = new FeatureFetcher({
    features,
    p2p,
    blockTokens: FEATURE_BLOCK_TOKENS,
    rowBytes: hiddenSize * bytesOf(dtype),
    counters,
    log: options.log,
    roomTimeoutMs: tuning.roomTimeoutMs ?? ROOM_TIMEOUT_MS,
    pullTimeoutMs: tuning.pullTimeoutMs ?? PULL_TIMEOUT_MS
  })

  return new LlmService({
    backend: 'pytorch',
    version: packageVersion(),
    epoch: leases.epoch,
    model,
    vision: options.vision,
    features,
    staging: false,
    scheduler,
    p2p,
    counters,
    blockTokens,
    maxLive: maxBatchSize + (options.maxQueue ?? DEFAULT_MAX_QUEUE),
    info: {
      feature: { ...shapes.feature, block_bytes: pools.feature.blockBytes, num_blocks: pools.feature.total },
      kv: { ...shapes.kv, block_bytes: pools.kv.blockBytes, num_blocks: pools.kv.total }
    },
    runtime: openRuntime({
      options,
      model,
      shape,
      kv: pools.kv,
      features,
      counters,
      engine (runner) {
        forget = sequence => runner.forget(sequence)
        return new LlmEngine({ scheduler, runner, features, fetcher, counters, log: options.log, migrations: MIGRATIONS, maxPositions: model.text.maxPositions })
      }
    })
  })
}
