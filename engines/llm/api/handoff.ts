import { MIGRATION_PROTOCOL } from '../../../adapters/wire/distserve.ts'
import type { HandoffWire, MigrationRequestWire } from '../../../adapters/wire/results.ts'
import type { Lease } from '../../cache/index.ts'
import type { LeaseGrants } from '../../cache/lease-grants.ts'
import type { ChatCall } from '../../service/engine-service.ts'
import type { LlmEngine } from '../engine.ts'
import type { SampledToken } from '../sequence/sampling.ts'
import type { KeptBlocks, Sequence } from '../sequence/sequence.ts'
import { finite } from './logprobs.ts'

export interface HandoffParts {
  readonly engineId: string
  readonly grants: LeaseGrants
  readonly engine: Pick<LlmEngine, 'wake'>
}

/** P -> D at P: puts the KV blocks of a finished sequence under a lease, and answers the migration request. */
export class Handoff {
  readonly #parts: HandoffParts
  readonly #call: ChatCall
  #finished: { readonly sequence: Sequence, readonly lease: Lease } | undefined

  constructor (parts: HandoffParts, call: ChatCall) {
    this.#parts = parts
    this.#call = call
  }

  /** Called when the sequence has completed; the lease owns its blocks from here on. */
  readonly keep = (sequence: Sequence, kept: KeptBlocks): void => {
    const { grants, engine } = this.#parts
    const free = (): void => {
      kept.release()
      engine.wake()
    }
    const [lease] = grants.open(this.#call, [{ pool: 'kv', blocks: kept.blocks, free }])
    this.#finished = { sequence, lease: lease as Lease }
  }

  /** Members to add to the answer; only after the sequence has completed. */
  answer (): HandoffWire {
    if (this.#finished === undefined) throw new Error('the sequence has not completed')
    const { sequence, lease: { id, sessionId, blocks } } = this.#finished
    const first = sequence.first as SampledToken
    return {
      cache_block_ids: blocks,
      remote_token_ids: [first.token],
      cache_session_id: sessionId,
      migration_request: {
        protocol: MIGRATION_PROTOCOL.tcp,
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
