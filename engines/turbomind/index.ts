import { randomInt } from 'node:crypto'
import { BlockPool, FeatureCache, LeaseTable } from '../cache/index.ts'
import { EngineCounters } from '../service/engine-service.ts'
import type { EngineOptions } from '../service/engine-options.ts'
import { EngineError } from '../service/errors.ts'
import { FeatureMigration } from '../llm/migration/feature-migration.ts'
import { LlmService } from '../llm/api/llm-service.ts'
import { bytesOf } from '../llm/runner/elements.ts'
import type { Runner } from '../llm/runner/runner.ts'
import { kvBlockElements } from '../llm/runner/shape.ts'
import {
  DEFAULT_KV_BYTES, DEFAULT_MAX_PREFILL_TOKENS, DEFAULT_MAX_QUEUE, featurePool, MIGRATIONS, openP2P, openRuntime, PULL_TIMEOUT_MS, ROOM_TIMEOUT_MS, runnerShape
} from '../llm/setup.ts'
import { FEATURE_BLOCK_TOKENS, featureBlockShape, featureBlocksFor, loadModel, type LoadedModel } from '../models/index.ts'
import { VERSION } from '../../adapters/wire/version.ts'
import { parseDevice } from '../runtime/index.ts'
import { EmbeddingTable } from './input-embeddings.ts'
import { FeatureShim } from './feature-shim.ts'
import { SlotScheduler } from './slot-scheduler.ts'
import { SlotTable } from './slot-table.ts'
import { TurbomindEngine } from './turbomind-engine.ts'

export const DEFAULT_SLOTS = 16
/** A session may be at least this long unless said otherwise, whatever memory that takes. */
const MIN_SESSION_LEN = 2048

/** Set by tests and measurements only. */
export interface TurbomindTuning {
  /** Idle slots keep their keys and values. @default true */
  readonly keepSessions?: boolean
  readonly roomTimeoutMs?: number
  readonly pullTimeoutMs?: number
}

/** LMDeploy's `session_len`: as the model, unless the slots together would take too much memory. */
function sessionLenOf (options: EngineOptions, model: LoadedModel, slots: number): number {
  const { maxPositions } = model.text
  if (options.sessionLen !== undefined) return Math.min(options.sessionLen, maxPositions)
  const tokenBytes = kvBlockElements({ ...model.text, blockTokens: 1 }) * bytesOf(model.dtype)
  return Math.min(maxPositions, Math.max(MIN_SESSION_LEN, Math.floor(DEFAULT_KV_BYTES / slots / tokenBytes)))
}

/** Where pulls are written, and where this engine's own vision encoder, if it has one, keeps its output. */
function stagingPool (options: EngineOptions, model: LoadedModel): BlockPool {
  if (options.vision) return featurePool(options, model)
  const { blockBytes } = featureBlockShape(model)
  return new BlockPool({ name: 'feature', numBlocks: options.featureBlocks ?? MIGRATIONS * featureBlocksFor(model.maxTokensPerItem), blockBytes })
}

/** The persistent batch and its pool. A slot is a block as long as a session, so the keys and values of a sequence are contiguous. */
function persistentBatch (options: EngineOptions, model: LoadedModel, keepSessions: boolean): { scheduler: SlotScheduler, pool: BlockPool, maxBatchSize: number } {
  const maxBatchSize = options.maxBatchSize ?? Math.min(DEFAULT_SLOTS, options.kvBlocks ?? DEFAULT_SLOTS)
  const numBlocks = options.kvBlocks ?? maxBatchSize
  const sessionLen = sessionLenOf(options, model, numBlocks)
  const blockBytes = kvBlockElements({ ...model.text, blockTokens: sessionLen }) * bytesOf(model.dtype)
  const pool = new BlockPool({ name: 'kv', numBlocks, blockBytes })
  const maxPrefillTokens = options.maxPrefillTokens ?? DEFAULT_MAX_PREFILL_TOKENS
  return { scheduler: new SlotScheduler(new SlotTable(pool, { keep: keepSessions }), { sessionLen, maxBatchSize, maxPrefillTokens }), pool, maxBatchSize }
}

/**
 * A TurboMind-like engine over a model folder: a persistent batch of slots, each with a contiguous KV region for a whole
 * session. Of role hybrid only. Resolves when `info` and `gauges` work; it can generate when its `ready` resolves.
 * @throws ModelError naming the file that is missing or wrong; EngineError `unsupported` for a role it does not have.
 */
export async function createTurbomindEngine (options: EngineOptions, tuning: TurbomindTuning = {}): Promise<LlmService> {
  if (options.role !== 'hybrid') throw new EngineError('unsupported', `a TurboMind engine has no role ${options.role}: use hybrid`)
  // Before any socket is open.
  parseDevice(options.device)
  const { log, vision } = options
  const model = await loadModel(options.modelDir, { vision, decoder: true, name: options.servedModelName })
  const { hiddenSize, dtype } = model
  const { scheduler, pool: slots, maxBatchSize } = persistentBatch(options, model, tuning.keepSessions ?? true)
  const staging = new FeatureCache(stagingPool(options, model))
  const counters = new EngineCounters()
  const leases = new LeaseTable(randomInt(1, 2 ** 47))
  const feature = { block_tokens: FEATURE_BLOCK_TOKENS, hidden_size: hiddenSize, dtype }
  const p2p = await openP2P(options, model, leases, { feature: { pool: staging.pool, shape: feature } })
  const embeddings = new EmbeddingTable(hiddenSize)
  const { roomTimeoutMs = ROOM_TIMEOUT_MS, pullTimeoutMs = PULL_TIMEOUT_MS } = tuning
  const shim = new FeatureShim({ staging, embeddings, hiddenSize, dtype, p2p, counters, log, concurrency: MIGRATIONS, roomTimeoutMs, pullTimeoutMs })
  const engine = (runner: Runner): TurbomindEngine => new TurbomindEngine({
    scheduler, runner, features: staging, path: new FeatureMigration(shim), counters, log, maxPositions: model.text.maxPositions, embeddings, hiddenSize, dtype
  })
  const shape = runnerShape(model, scheduler.maxTokens)
  return new LlmService({
    backend: 'turbomind',
    version: VERSION,
    engineId: options.engineId,
    role: 'hybrid',
    leases,
    log,
    model,
    vision,
    features: staging,
    staging: true,
    scheduler,
    p2p,
    counters,
    blockTokens: scheduler.maxTokens,
    maxLive: maxBatchSize + (options.maxQueue ?? DEFAULT_MAX_QUEUE),
    info: {
      feature: { ...feature, block_bytes: staging.pool.blockBytes, num_blocks: staging.pool.total },
      kv: { slots: slots.total, session_len: scheduler.maxTokens }
    },
    runtime: openRuntime({ options, model, shape, kv: slots, features: staging, counters, featuresOf: chunk => embeddings.featuresOf(chunk), engine })
  })
}
