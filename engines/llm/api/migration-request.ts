import { DEFAULT_MAX_ITEMS } from '../../encoder/media-parts.ts'
import { EngineError } from '../../service/errors.ts'
import type { LoadedModel, MediaSpan } from '../../models/family.ts'
import { count, dict, integers, list, PROTOCOL_TCP, reject, remoteBlocks, text, type Dict } from './wire-fields.ts'
import type { SampledToken } from '../sequence/sampling.ts'
import type { MigratedMedia, MigrationRequest } from '../sequence/remote.ts'

/** LMDeploy's members, then ours; snake_case, as it travels. */
export interface MigrationRequestWire {
  readonly protocol: typeof PROTOCOL_TCP
  readonly remote_engine_id: string
  readonly epoch: number
  readonly lease: string
  readonly remote_session_id: number
  readonly remote_block_ids: readonly number[]
  readonly remote_token_id: number
  readonly is_dummy_prefill: false
  readonly token_ids: readonly number[]
  readonly next_position: number
  readonly media: ReadonlyArray<{ readonly content_hash: string, readonly num_tokens: number }>
  readonly media_spans: readonly MediaSpan[]
  readonly cached_tokens: number
  readonly first_token?: { readonly logprob: number, readonly top: ReadonlyArray<{ readonly token: number, readonly logprob: number }> }
}

const PARAM = 'migration_request'
/** As many alternatives as a request may ask for. */
const MAX_TOP = 20

export interface MigrationLimits {
  readonly model: LoadedModel
  /** Tokens of a KV block. */
  readonly blockTokens: number
  /** The request asks for log probabilities. */
  readonly logprobs: boolean
}

/** @throws EngineError `invalid_request` naming the member at fault. */
export function parseMigrationRequest (value: unknown, { model, blockTokens, logprobs }: MigrationLimits): MigrationRequest {
  const entry = dict(value, 'a migration request', PARAM)
  const { vocab, maxPositions } = model.text
  if (entry.is_dummy_prefill !== undefined && entry.is_dummy_prefill !== false) reject('"is_dummy_prefill" must be false: there would be nothing to pull', `${PARAM}.is_dummy_prefill`)
  const tokens = integers(entry, 'token_ids', PARAM, { length: maxPositions, max: vocab - 1 })
  if (tokens.length === 0) reject('"token_ids" must not be empty', `${PARAM}.token_ids`)
  count(entry, 'remote_session_id', PARAM)
  const remote = remoteBlocks(entry, PARAM)
  const needed = Math.ceil(tokens.length / blockTokens)
  if (remote.blocks.length !== needed || new Set(remote.blocks).size !== needed) {
    reject(`${tokens.length} tokens take ${needed} KV blocks of ${blockTokens}, ${remote.blocks.length} are named`, `${PARAM}.remote_block_ids`)
  }
  const media = list(entry, 'media', PARAM, DEFAULT_MAX_ITEMS, (item, param) => readMedia(dict(item, 'a media item', param), param, maxPositions))
  return {
    ...remote,
    tokens,
    next: count(entry, 'next_position', PARAM, { min: 1, max: tokens.length }),
    media,
    spans: readSpans(entry, media, tokens.length),
    cachedTokens: count(entry, 'cached_tokens', PARAM, { max: tokens.length }),
    first: { token: count(entry, 'remote_token_id', PARAM, { max: vocab - 1 }), ...(logprobs ? readLogprobs(entry, vocab) : {}) }
  }
}

function readMedia (item: Dict, param: string, max: number): MigratedMedia {
  return { contentHash: text(item, 'content_hash', param), numTokens: count(item, 'num_tokens', param, { min: 1, max }) }
}

/** Spans lie inside the prompt, one after the other, and inside their items. */
function readSpans (entry: Dict, media: readonly MigratedMedia[], length: number): MediaSpan[] {
  let end = 0
  return list(entry, 'media_spans', PARAM, length, (value, param) => {
    const span = dict(value, 'a media span', param)
    const item = count(span, 'item', param)
    const of = media[item]
    if (of === undefined) reject(`"item" is ${item}, there are ${media.length} media items`, `${param}.item`)
    const start = count(span, 'start', param, { min: end, max: length - 1 })
    const size = count(span, 'length', param, { min: 1, max: length - start })
    const offset = count(span, 'offset', param)
    if (offset + size > of.numTokens) reject(`rows ${offset} to ${offset + size} are not in an item of ${of.numTokens} tokens`, `${param}.offset`)
    end = start + size
    return { item, start, length: size, offset }
  })
}

function readLogprobs (entry: Dict, vocab: number): Pick<SampledToken, 'logprob' | 'top'> {
  const param = `${PARAM}.first_token`
  const first = dict(entry.first_token, 'the request asks for log probabilities, so "first_token"', param)
  const top = list(first, 'top', param, MAX_TOP, (value, at) => {
    const candidate = dict(value, 'a candidate', at)
    return { token: count(candidate, 'token', at, { max: vocab - 1 }), logprob: readLogprob(candidate, at) }
  })
  return { logprob: readLogprob(first, param), top }
}

function readLogprob (entry: Dict, param: string): number {
  const { logprob } = entry
  if (typeof logprob !== 'number' || !Number.isFinite(logprob)) reject('"logprob" must be a number', `${param}.logprob`)
  return logprob
}

/** The prompt of a migration request must leave room for what is to be generated here. */
export function checkLength ({ tokens }: MigrationRequest, maxLength: number): void {
  if (tokens.length < maxLength) return
  throw new EngineError('context_length_exceeded', `this engine takes ${maxLength} tokens, prompt and output together; the migrated prompt alone has ${tokens.length}`, { param: `${PARAM}.token_ids` })
}
