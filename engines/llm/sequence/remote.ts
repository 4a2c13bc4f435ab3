/** What a sequence brings from other engines: where blocks lie, and what they hold. */
import type { MediaSpan } from '../../models/family.ts'
import type { SampledToken } from './sampling.ts'

/** Where blocks lie in another engine, and the lease under which they may be pulled. */
export interface RemoteBlocks {
  readonly engineId: string
  readonly epoch: number
  readonly lease: string
  readonly blocks: readonly number[]
}

/** What an encoder answered for one media item: where its features lie, and under which lease. */
export interface EncoderResultEntry extends RemoteBlocks {
  readonly contentHash: string
  readonly numTokens: number
  readonly grid: readonly number[]
}

/** A media item of a migrated prompt: its features stayed with P, its content still tells prefixes apart. */
export interface MigratedMedia {
  readonly contentHash: string
  readonly numTokens: number
}

/** What P answered: where keys and values of the prompt lie, the first token, and all that D must know to go on. */
export interface MigrationRequest extends RemoteBlocks {
  /** The prompt after expansion of media; the blocks cover exactly these. */
  readonly tokens: readonly number[]
  /** Position of the first generated token, on every axis. */
  readonly next: number
  readonly media: readonly MigratedMedia[]
  readonly spans: readonly MediaSpan[]
  /** Prompt tokens in P's prefix cache. */
  readonly cachedTokens: number
  /** With its log probabilities when the request asks for them. */
  readonly first: SampledToken
}
