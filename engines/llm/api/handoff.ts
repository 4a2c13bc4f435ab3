import type { Lease } from '../../cache/index.ts'
import type { ChatCall } from '../../service/engine-service.ts'
import type { LeaseGrants } from '../../cache/lease-grants.ts'
import type { LlmEngine } from '../engine.ts'
import type { MigrationRequestWire } from './migration-request.ts'
import type { KeptBlocks, Sequence } from '../sequence/sequence.ts'
import { PROTOCOL_TCP } from './wire-fields.ts'
import { finite } from './logprobs.ts'
import type { SampledToken } from '../sequence/sampling.ts'

/** What P's answer has beside the completion: LMDeploy's members, and all that D needs. */
export interface HandoffWire {
  readonly cache_block_ids: readonly number[]
  readonly remote_token_ids: readonly number[]
  readonly cache_session_id: number
  readonly migration_request: MigrationRequestWire
}

export interface HandoffParts {
  readonly engineId: string
  readonly grants: LeaseGrants
  readonly engine: Pick<LlmEngine, 'wake'>
}

/** Leaves the KV blocks of a finished sequence under a lease and says what another engine needs to go on from there. */
export class Handoff {
  readonly #parts: HandoffParts
  readonly #call: ChatCall
  #left: { readonly sequence: Sequence, readonly lease: Lease } | undefined

  constructor (parts: HandoffParts, call: ChatCall) {
    this.#parts = parts
    this.#call = call
  }

  /** The sequence has ended well; its blocks are the lease's from here on. */
  readonly keep = (sequence: Sequence, kept: KeptBlocks): void => {
    const { grants, engine } = this.#parts
    const free = (): void => {
      kept.release()
      engine.wake()
    }
    const [lease] = grants.open(this.#call, [{ pool: 'kv', blocks: kept.blocks, free }])
    this.#left = { sequence, lease: lease as Lease }
  }

  /** For the answer; only after the sequence has ended well. */
  answer (): HandoffWire {
    if (this.#left === undefined) throw new Error('the sequence has left nothing')
    const { sequence, lease: { id, sessionId, blocks } } = this.#left
    const first = sequence.first as SampledToken
    return {
      cache_block_ids: blocks,
      remote_token_ids: [first.token],
      cache_session_id: sessionId,
      migration_request: {
        protocol: PROTOCOL_TCP,
        remote_engine_id: this.#parts.engineId,
        epoch: this.#parts.grants.epoch,
        lease: id,
        remote_session_id: sessionId,
        remote_block_ids: blocks,
        remote_token_id: first.token,
        is_dummy_prefill: false,
        token_ids: sequence.tokens.slice(0, sequence.promptLength),
        next_position: sequence.positions.next,
        media: sequence.media.map(({ contentHash, numTokens }) => ({ content_hash: contentHash, num_tokens: numTokens })),
        media_spans: sequence.spans,
        cached_tokens: sequence.cachedTokens ?? 0,
        ...firstToken(first)
      }
    }
  }
}

function firstToken ({ logprob, top = [] }: SampledToken): Pick<MigrationRequestWire, 'first_token'> {
  if (logprob === undefined) return {}
  return { first_token: { logprob: finite(logprob), top: top.map(({ token, logprob }) => ({ token, logprob: finite(logprob) })) } }
}
