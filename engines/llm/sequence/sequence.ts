import type { Context } from '@opentelemetry/api'
import type { MediaSpan, Positions } from '../../models/family.ts'
import type { MigrationRequest, Prompt, SequenceMedia } from './prompt.ts'
import type { SampledToken, SamplingParams } from './sampling.ts'

/** The moves between states are in states.ts. */
export type SequenceState =
  | 'WAITING' | 'RUNNING' | 'LOCKED'
  | 'WAITING_EPD_MIGRATION' | 'RUNNING_EPD_MIGRATION' | 'EPD_MIGRATION_LOCKED'
  | 'WAITING_MIGRATION' | 'RUNNING_MIGRATION' | 'MIGRATION_LOCKED' | 'MIGRATION_DONE'
  | 'STOPPED' | 'ABORTED' | 'ENDED'

/** Why a sequence ended. `stopped` and `aborted` are cancel and error. */
export type Outcome =
  | { readonly kind: 'stop', readonly reason: 'eos' | 'stop_id' | 'stop_string' | 'complete' }
  | { readonly kind: 'length' }
  | { readonly kind: 'stopped', readonly error: Error }
  | { readonly kind: 'aborted', readonly error: Error }

/** Receives the output of a sequence; called on the main thread, never re-entrantly from a state move. */
export interface SequenceSink {
  /** One more token. True: the text so far ends the sequence (a stop string). */
  onToken (sequence: Sequence, token: SampledToken): boolean
  onEnd (sequence: Sequence, outcome: Outcome): void
  /** Its reader is so far behind that no more tokens are computed until it has caught up. */
  readonly full?: boolean
}

/** KV blocks that stay referenced after a sequence has completed, until `release` is called, once. */
export interface KeptBlocks {
  readonly blocks: readonly number[]
  release (): void
}

/** What its output may be; the sequence is decoded when `mask` is there. */
export interface SequenceConstraint {
  /** One bit for each token that may come next; undefined while they are computed. */
  readonly mask: Uint32Array | undefined
  /** The output is whole, and nothing may follow. */
  readonly complete: boolean
  /** Takes the next token of the output. */
  accept (token: number): void
  close (): void
}

export interface SequenceInit extends Prompt {
  readonly id: number
  readonly requestId: string
  /** Root of the prefix hashes: requests of different tenants share no blocks. */
  readonly cacheSalt: string
  readonly sampling: SamplingParams
  /** Most tokens to generate. 0: only its keys and values are computed, for the prefix cache. */
  readonly maxTokens: number
  /** Takes over the KV blocks when generation is complete; by default they are freed. */
  readonly keep?: ((sequence: Sequence, kept: KeptBlocks) => void) | undefined
  readonly context: Context
  readonly sink: SequenceSink
  readonly constraint?: SequenceConstraint | undefined
}

/** Milliseconds of `performance.now()`; undefined until then. */
export interface SequenceTimes {
  readonly arrived: number
  admitted?: number
  firstToken?: number
  lastToken?: number
}

/**
 * One prompt and what was generated for it. State and derived facts only: moves between states are in
 * states.ts, blocks in the block manager, tensors in the runner.
 */
export class Sequence {
  readonly id: number
  readonly requestId: string
  /** Prompt, then generated tokens. */
  readonly tokens: number[]
  readonly promptLength: number
  readonly positions: Positions
  readonly spans: readonly MediaSpan[]
  readonly media: readonly SequenceMedia[]
  readonly cacheSalt: string
  readonly sampling: SamplingParams
  readonly maxTokens: number
  readonly migration: MigrationRequest | undefined
  readonly keep: SequenceInit['keep']
  readonly context: Context
  readonly sink: SequenceSink
  readonly constraint: SequenceConstraint | undefined
  readonly times: SequenceTimes

  state: SequenceState
  /** A cancel or error that waits for the sequence to leave a state in which its blocks are read or written. */
  interruption: Extract<Outcome, { kind: 'stopped' | 'aborted' }> | undefined
  outcome: Outcome | undefined
  /** Its numbers are not finite: nothing that was computed from them, or for them, is kept for others. */
  broken = false

  /** KV blocks in token order. */
  blocks: number[] = []
  /** Prefix hashes of the full blocks, as far as computed. */
  hashes: string[] = []
  /** Tokens whose keys and values lie in `blocks`. */
  computed = 0
  /** How many of `blocks` are findable by their hash. */
  committed = 0
  /** Prompt tokens that were computed ahead of it, when it was last admitted: they lie in the prefix cache, and are no hits. */
  ahead = 0
  /** Prompt tokens found in the prefix cache (of the engine that prefilled it) when it was first admitted. */
  cachedTokens: number | undefined
  /** The first generated token, as it was sampled. */
  first: SampledToken | undefined
  /** Copies of its KV blocks, in token order, while it waits after an eviction; only if it arrived by migration. */
  spilled: readonly Uint8Array[] | undefined
  /** Times it was evicted. */
  evictions = 0

  constructor (init: SequenceInit, state: SequenceState) {
    this.id = init.id
    this.requestId = init.requestId
    this.tokens = [...init.tokens]
    this.promptLength = init.tokens.length
    this.positions = init.positions
    this.spans = init.spans
    this.media = init.media
    this.cacheSalt = init.cacheSalt
    this.sampling = init.sampling
    this.maxTokens = init.maxTokens
    this.migration = init.migration
    this.keep = init.keep
    this.cachedTokens = init.migration?.cachedTokens
    this.first = init.migration?.first
    this.context = init.context
    this.sink = init.sink
    this.constraint = init.constraint
    this.times = { arrived: performance.now() }
    this.state = state
  }

  get length (): number {
    return this.tokens.length
  }

  get generated (): number {
    return this.tokens.length - this.promptLength
  }

  /** A decode step may compute its next token. */
  get decodes (): boolean {
    return this.prefillLeft === 0 && this.sink.full !== true && (this.constraint === undefined || this.constraint.mask !== undefined)
  }

  /** The last token is always left to a decode step, which samples from it; prefill computes all before it. */
  get prefillLeft (): number {
    return this.tokens.length - 1 - this.computed
  }

  /** Position of token `index` on `axis`; generated tokens follow on from the prompt. */
  positionOf (index: number, axis: number): number {
    if (index >= this.promptLength) return this.positions.next + index - this.promptLength
    return this.positions.values[axis * this.promptLength + index] as number
  }
}

/** Tokens `[start, start + count)` of a prompt. */
export interface PrefillChunk {
  readonly sequence: Sequence
  readonly start: number
  readonly count: number
}
