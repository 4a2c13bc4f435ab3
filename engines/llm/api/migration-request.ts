import { DEFAULT_MAX_ITEMS } from '../../encoder/media-parts.ts'
import type { LoadedModel, MediaSpan } from '../../models/family.ts'
import type { MigrationRequest, SequenceMedia } from '../sequence/prompt.ts'
import type { SampledToken } from '../sequence/sampling.ts'
import { readObject, refuse, requireInteger, requireIntegers, requireList, requireRemoteBlocks, requireText, type Json } from './fields.ts'

const PATH = 'migration_request'
/** As many alternatives as a request may ask for. */
const MAX_TOP = 20

export interface MigrationLimits {
  readonly model: LoadedModel
  /** Tokens of a KV block. */
  readonly blockTokens: number
  /** The request asks for log probabilities. */
  readonly logprobs: boolean
}

/**
 * Reads MigrationRequestWire (adapters/wire/results.ts).
 * @throws EngineError `invalid_request` naming the member at fault.
 */
export function parseMigrationRequest (value: unknown, { model, blockTokens, logprobs }: MigrationLimits): MigrationRequest {
  const entry = readObject(value, PATH, 'a migration request')
  const { vocab, maxPositions } = model.text
  if (entry.is_dummy_prefill !== undefined && entry.is_dummy_prefill !== false) refuse(`${PATH}.is_dummy_prefill`, '"is_dummy_prefill" must be false: there would be nothing to pull')
  const tokens = requireIntegers(entry, 'token_ids', PATH, { length: maxPositions, max: vocab - 1 })
  if (tokens.length === 0) refuse(`${PATH}.token_ids`, '"token_ids" must not be empty')
  requireInteger(entry, 'remote_session_id', PATH)
  const remote = requireRemoteBlocks(entry, PATH)
  const needed = Math.ceil(tokens.length / blockTokens)
  if (remote.blocks.length !== needed || new Set(remote.blocks).size !== needed) {
    refuse(`${PATH}.remote_block_ids`, `${tokens.length} tokens take ${needed} KV blocks of ${blockTokens}, ${remote.blocks.length} are named`)
  }
  const media = requireList(entry, 'media', PATH, DEFAULT_MAX_ITEMS, (item, path) => readMedia(readObject(item, path, 'a media item'), path, maxPositions))
  return {
    ...remote,
    tokens,
    next: requireInteger(entry, 'next_position', PATH, { min: 1, max: tokens.length }),
    media,
    spans: readSpans(entry, media, tokens.length),
    cachedTokens: requireInteger(entry, 'cached_tokens', PATH, { max: tokens.length }),
    first: { token: requireInteger(entry, 'remote_token_id', PATH, { max: vocab - 1 }), ...(logprobs ? readLogprobs(entry, vocab) : {}) }
  }
}

/** The features stay with P; the content hash is part of the prefix hashes. */
function readMedia (item: Json, path: string, max: number): SequenceMedia {
  return { contentHash: requireText(item, 'content_hash', path), numTokens: requireInteger(item, 'num_tokens', path, { min: 1, max }), grid: [] }
}

/** Spans lie inside the prompt, in order, without overlap, and inside their items. */
function readSpans (entry: Json, media: readonly SequenceMedia[], length: number): MediaSpan[] {
  let end = 0
  return requireList(entry, 'media_spans', PATH, length, (value, path) => {
    const span = readObject(value, path, 'a media span')
    const item = requireInteger(span, 'item', path)
    const of = media[item]
    if (of === undefined) refuse(`${path}.item`, `"item" is ${item}, there are ${media.length} media items`)
    const start = requireInteger(span, 'start', path, { min: end, max: length - 1 })
    const size = requireInteger(span, 'length', path, { min: 1, max: length - start })
    const offset = requireInteger(span, 'offset', path)
    if (offset + size > of.numTokens) refuse(`${path}.offset`, `rows ${offset} to ${offset + size} are not in an item of ${of.numTokens} tokens`)
    end = start + size
    return { item, start, length: size, offset }
  })
}

function readLogprobs (entry: Json, vocab: number): Pick<SampledToken, 'logprob' | 'top'> {
  const path = `${PATH}.first_token`
  const first = readObject(entry.first_token, path, 'the request asks for log probabilities, so "first_token"')
  const top = requireList(first, 'top', path, MAX_TOP, (value, at) => {
    const candidate = readObject(value, at, 'a candidate')
    return { token: requireInteger(candidate, 'token', at, { max: vocab - 1 }), logprob: readLogprob(candidate, at) }
  })
  return { logprob: readLogprob(first, path), top }
}

function readLogprob (entry: Json, path: string): number {
  const { logprob } = entry
  if (typeof logprob !== 'number' || !Number.isFinite(logprob)) refuse(`${path}.logprob`, '"logprob" must be a number')
  return logprob
}
