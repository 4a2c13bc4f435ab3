/** What one stage leaves for the next, as it travels in request and answer bodies: LMDeploy's members, and ours. */
import type { MIGRATION_PROTOCOL } from './distserve.ts'

/** Members of a request that only a gateway may write; it strips them from what clients send. */
export const CONTROL_FIELDS = ['encoder_result', 'migration_request', 'with_cache', 'preserve_cache'] as const

/** Member of a request that separates caches of different customers; a client may not send it either. */
export const TENANT_FIELD = 'epd_tenant'

/** Scheme of a media URL that names a lease on features or KV blocks in place of pixels: `epd:<lease>`. Only the gateway writes it. */
export const LEASE_SCHEME = 'epd:'

/** Transfer formats of our engines, in `produces` and `accepts` of engine_info. */
export const FEATURES_FORMAT = 'features:epd-zmq/1'
export const KV_FORMAT = 'kv:epd-zmq/1'

/** Where blocks lie in another engine, and the lease under which they may be pulled. */
interface RemoteBlocksWire {
  readonly protocol: typeof MIGRATION_PROTOCOL.tcp
  readonly remote_engine_id: string
  readonly epoch: number
  readonly lease: string
  readonly remote_session_id: number
  readonly remote_block_ids: readonly number[]
}

/** What an encoder answers for each media item, and what PD or P gets in `encoder_result`. */
export interface EncoderResultWire extends RemoteBlocksWire {
  /** Position of the item: `messages[message].content[part]`. */
  readonly message: number
  readonly part: number
  readonly content_hash: string
  readonly modality: 'image'
  readonly num_tokens: number
  readonly grid: readonly number[]
  readonly hidden_size: number
  readonly dtype: 'float32' | 'float16'
  /** The encoder had the features before this request. */
  readonly cached: boolean
  /** Of an offer: which item of the consumer's request it is, `<id>:<n>`. */
  readonly for?: string | undefined
}

/** What P leaves for D: where the KV blocks of the prompt lie, the first token, and the prompt itself. */
export interface MigrationRequestWire extends RemoteBlocksWire {
  readonly remote_token_id: number
  readonly is_dummy_prefill: false
  /** The prompt after expansion of media; the blocks cover exactly these tokens. */
  readonly token_ids: readonly number[]
  /** Position of the first generated token, on every axis. */
  readonly next_position: number
  readonly media: ReadonlyArray<{ readonly content_hash: string, readonly num_tokens: number }>
  /** `length` prompt tokens from `start` are rows of media item `item` from `offset`. */
  readonly media_spans: ReadonlyArray<{ readonly item: number, readonly start: number, readonly length: number, readonly offset: number }>
  /** Prompt tokens that P had in its prefix cache. */
  readonly cached_tokens: number
  readonly first_token?: { readonly logprob: number, readonly top: ReadonlyArray<{ readonly token: number, readonly logprob: number }> }
}

/** What P's answer has beside the completion: LMDeploy's members, then ours. */
export interface HandoffWire {
  readonly cache_block_ids: readonly number[]
  readonly remote_token_ids: readonly number[]
  readonly cache_session_id: number
  readonly migration_request: MigrationRequestWire
}
