/** What a sequence starts from: tokens, media items, and blocks in other engines. */
import type { FeatureEntry } from '../../cache/feature-cache.ts'
import type { MediaSpan, Positions } from '../../models/family.ts'
import type { SampledToken } from './sampling.ts'

/** Blocks in another engine, and the lease under which they may be pulled. */
export interface RemoteBlocks {
  readonly engineId: string
  readonly epoch: number
  readonly lease: string
  readonly blocks: readonly number[]
}

/** One media item of a prompt. */
export interface SequenceMedia {
  readonly contentHash: string
  readonly numTokens: number
  /** Rows and columns as the model family defines them; empty when another engine laid out the prompt. */
  readonly grid: readonly number[]
  /** Feature blocks to pull; absent when this engine encoded the item, or when it pulls the keys and values instead. */
  readonly source?: RemoteBlocks
  /** The features in this engine. The item holds one reference to them until its sequence has ENDED. */
  features?: FeatureEntry | undefined
}

/** A media item whose features are in another engine. */
export type RemoteMedia = SequenceMedia & { readonly source: RemoteBlocks }

/** The prompt that another engine prefilled, and what decoding needs to continue from its KV blocks. */
export interface MigrationRequest extends RemoteBlocks {
  /** The prompt after expansion of media; the blocks cover exactly these. */
  readonly tokens: readonly number[]
  /** Position of the first generated token, on every axis. */
  readonly next: number
  readonly media: readonly SequenceMedia[]
  readonly spans: readonly MediaSpan[]
  /** Prompt tokens that the prefill engine had in its prefix cache. */
  readonly cachedTokens: number
  /** The token that the prefill engine sampled; with its log probabilities when the request asks for them. */
  readonly first: SampledToken
}

/** A prompt after expansion of media. */
export interface Prompt {
  readonly tokens: readonly number[]
  readonly positions: Positions
  /** Which tokens stand for which rows of which item's features, in order. */
  readonly spans: readonly MediaSpan[]
  readonly media: readonly SequenceMedia[]
  /** Set when the keys and values are pulled: then this engine computes nothing of the prompt. */
  readonly migration?: MigrationRequest
}
