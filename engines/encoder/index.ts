import { randomInt } from 'node:crypto'
import { BlockPool, FeatureCache, LeaseTable } from '../cache/index.ts'
import { EngineCounters } from '../service/engine-service.ts'
import type { EngineOptions } from '../service/engine-options.ts'
import { FEATURE_BLOCK_TOKENS, featureBlockShape, featureBlocksFor, loadModel, type LoadedModel } from '../models/index.ts'
import { P2PNode } from '../p2p/index.ts'
import type { EncoderResultWire } from '../../adapters/wire/results.ts'
import { VERSION } from '../../adapters/wire/version.ts'
import { parseDevice, threadsPerEngine } from '../runtime/index.ts'
import { EncoderEngine } from './encoder-engine.ts'
import { VisionRunner } from './vision-runner.ts'

export { EncoderEngine } from './encoder-engine.ts'
export { MediaLoader, type MediaLoaderOptions } from './media-loader.ts'
export * from './vision.ts'

/** Memory for feature blocks unless said otherwise, bytes. */
const DEFAULT_FEATURE_BYTES = 256 * 1024 * 1024
const MAX_DEFAULT_BLOCKS = 4096
/** Items of the largest size that always fit. */
const MIN_ITEMS = 4

/** How many feature blocks an engine keeps when no number is given. */
export function defaultFeatureBlocks (model: LoadedModel): number {
  const fitting = Math.floor(DEFAULT_FEATURE_BYTES / featureBlockShape(model).blockBytes)
  return Math.max(MIN_ITEMS * featureBlocksFor(model.maxTokensPerItem), Math.min(MAX_DEFAULT_BLOCKS, fitting))
}

/**
 * An encoder engine over a model folder. Resolves when it can be asked about; `ready` when it can encode. The folder's
 * decoder files are never opened and may be missing.
 * @throws ModelError naming the file that is missing or wrong.
 */
export async function createEncoderEngine (options: EngineOptions): Promise<EncoderEngine> {
  const device = parseDevice(options.device)
  const model = await loadModel(options.modelDir, { vision: true, decoder: false, name: options.servedModelName })
  const { hiddenSize, dtype, blockBytes } = featureBlockShape(model)
  const pool = new BlockPool({ name: 'feature', numBlocks: options.featureBlocks ?? defaultFeatureBlocks(model), blockBytes })
  const cache = new FeatureCache(pool)
  const leases = new LeaseTable(randomInt(1, 2 ** 47))
  const counters = new EngineCounters()
  const offers = new Map<string, EncoderResultWire>()
  const p2p = await P2PNode.open({
    engineId: options.engineId,
    epoch: leases.epoch,
    host: options.host,
    pools: { feature: { pool, shape: { block_tokens: FEATURE_BLOCK_TOKENS, hidden_size: hiddenSize, dtype } } },
    leases,
    fingerprint: model.fingerprint,
    curve: options.curve,
    allowedPeers: options.allowedPeers,
    offers,
    log: options.log
  })
  const vision = VisionRunner.open({
    model, device, threads: threadsPerEngine(options.threads, options.sharing), cache, media: options.media, counters, maxBatchSize: options.maxBatchSize, maxQueue: options.maxQueue, log: options.log
  })
  return new EncoderEngine({ engineId: options.engineId, version: VERSION, model, cache, leases, offers, p2p, counters, vision, leaseMs: options.leaseMs, log: options.log })
}
