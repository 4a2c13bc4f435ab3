/** What the two LLM engines have in common: defaults, pools, the P2P end, tokenizer and sessions. */
import { BlockPool, type FeatureCache, type LeaseTable } from '../cache/index.ts'
import type { EngineCounters } from '../service/engine-service.ts'
import { VisionRunner } from '../encoder/vision.ts'
import type { EngineOptions } from '../service/engine-options.ts'
import { FEATURE_BLOCK_TOKENS, featureBlockShape, featureBlocksFor, type LoadedModel } from '../models/index.ts'
import { P2PNode, type P2PNodeOptions } from '../p2p/index.ts'
import { parseDevice, threadsPerEngine } from '../runtime/index.ts'
import { Vocabulary } from './grammar/vocabulary.ts'
import { ChatTemplate } from './text/chat-template.ts'
import type { LlmEngine } from './engine.ts'
import type { LlmRuntime } from './api/llm-service.ts'
import { Runner, type RunnerOptions } from './runner/runner.ts'
import type { RunnerShape } from './runner/shape.ts'
import { PromptText } from './text/prompt-text.ts'
import { loadTokenizer } from './text/tokenizer.ts'

export const DEFAULT_MAX_QUEUE = 256
export const DEFAULT_MAX_PREFILL_TOKENS = 256
/** Memory for KV and feature blocks unless said otherwise, bytes. */
export const DEFAULT_KV_BYTES = 256 * 1024 * 1024
const DEFAULT_FEATURE_BYTES = 128 * 1024 * 1024
const MIN_ITEMS = 4
/** Pulls of blocks at once. */
export const MIGRATIONS = 8
export const ROOM_TIMEOUT_MS = 10_000
export const PULL_TIMEOUT_MS = 30_000

/** Feature blocks for an engine that keeps features: in its sequences, or in the cache of its own vision encoder. */
export function featurePool (options: EngineOptions, model: LoadedModel): BlockPool {
  const { blockBytes } = featureBlockShape(model)
  const atLeast = MIN_ITEMS * featureBlocksFor(model.maxTokensPerItem)
  return new BlockPool({ name: 'feature', numBlocks: options.featureBlocks ?? Math.max(atLeast, Math.floor(DEFAULT_FEATURE_BYTES / blockBytes)), blockBytes })
}

/** This engine's end of P2P links. @throws P2PError when no socket can be opened. */
export async function openP2P (options: EngineOptions, model: LoadedModel, leases: LeaseTable, pools: P2PNodeOptions['pools'], onOffer?: P2PNodeOptions['onOffer']): Promise<P2PNode> {
  const { engineId, host, curve, allowedPeers, log } = options
  return await P2PNode.open({ engineId, epoch: leases.epoch, host, pools, leases, fingerprint: model.fingerprint, curve, allowedPeers, onOffer, log })
}

/** What the session worker needs to know, for KV blocks of `blockTokens` tokens. */
export function runnerShape (model: LoadedModel, blockTokens: number): RunnerShape {
  const { embed, decoder } = model.files
  const { layers, kvHeads, headDim } = model.text
  const position = model.graphs.decoder?.inputs.find(input => input.name === 'position_ids')
  return {
    embed: embed as string,
    decoder: decoder as string,
    layers,
    kvHeads,
    headDim,
    hiddenSize: model.hiddenSize,
    dtype: model.dtype,
    blockTokens,
    featureBlockTokens: FEATURE_BLOCK_TOKENS,
    positionAxes: position?.shape.length === 3 ? 3 : 1
  }
}

export interface RuntimeParts extends Pick<RunnerOptions, 'featuresOf'> {
  readonly options: EngineOptions
  readonly model: LoadedModel
  readonly shape: RunnerShape
  readonly kv: BlockPool
  readonly features: FeatureCache
  readonly counters: EngineCounters
  engine (runner: Runner): LlmEngine
}

/** Loads the tokenizer and opens the sessions. @throws when a file, a package or the device can't be used. */
export async function openRuntime ({ options, model, shape, kv, features, counters, featuresOf, engine }: RuntimeParts): Promise<LlmRuntime> {
  const device = parseDevice(options.device)
  const threads = threadsPerEngine(options.threads, options.sharing)
  const { tokenizer, config } = await loadTokenizer(model.dir)
  const template = await ChatTemplate.load(model.dir, config, tokenizer.specialText)
  const runner = await Runner.open({ shape, device, threads, pools: { kv: kv.sab, feature: features.pool.sab }, featuresOf, log: options.log })
  const vision = options.vision
    ? await VisionRunner.open({ model, device, threads, cache: features, media: options.media, counters, maxQueue: options.maxQueue, log: options.log }).catch(async err => {
      await runner.close()
      throw err
    })
    : undefined
  const running = engine(runner)
  const text = new PromptText({ dir: model.dir, tokenizer, template, maxLength: () => running.maxLength, log: options.log })
  let vocabulary: Promise<Vocabulary> | undefined
  return { engine: running, runner, vision, tokenizer, text, vocabulary: async () => await (vocabulary ??= Vocabulary.of(tokenizer, model.text.vocab)) }
}
