import { EngineError } from '../errors.ts'
import type { MediaItem } from '../encoder/media-parts.ts'
import { featureBlocksFor, type LoadedModel } from '../models/family.ts'

/** What an encoder answered for one media item: where its features lie, and under which lease. */
export interface EncoderResultEntry {
  readonly contentHash: string
  readonly numTokens: number
  readonly grid: readonly number[]
  readonly engineId: string
  readonly epoch: number
  readonly lease: string
  readonly blocks: readonly number[]
}

type Dict = Record<string, unknown>

/** LMDeploy's protocol number for TCP, the only one our engines speak. */
const PROTOCOL_TCP = 1

function reject (message: string, param: string): never {
  throw new EngineError('invalid_request', message, { param })
}

function text (entry: Dict, key: string, param: string): string {
  const value = entry[key]
  if (typeof value !== 'string' || value === '' || value.length > 2048) reject(`"${key}" must be a non-empty string`, `${param}.${key}`)
  return value
}

function count (entry: Dict, key: string, param: string): number {
  const value = entry[key]
  if (typeof value !== 'number' || !Number.isSafeInteger(value) || value < 0) reject(`"${key}" must be a non-negative integer`, `${param}.${key}`)
  return value
}

function integers (entry: Dict, key: string, param: string): number[] {
  const value = entry[key]
  const valid = Array.isArray(value) && value.length <= 65536 && value.every(v => Number.isSafeInteger(v) && (v as number) >= 0)
  if (!valid) reject(`"${key}" must be a list of non-negative integers`, `${param}.${key}`)
  return value as number[]
}

/** Features that another model made would be read as nonsense, or not fit at all. */
function checkModel (entry: Dict, model: LoadedModel, param: string): void {
  const mismatch = (key: string, ours: unknown): void => {
    if (entry[key] !== ours) {
      throw new EngineError('wrong_model', `the encoder result's ${key} is ${JSON.stringify(entry[key])?.slice(0, 60)}, this model takes ${String(ours)}`, { param: `${param}.${key}` })
    }
  }
  mismatch('hidden_size', model.hiddenSize)
  mismatch('dtype', model.dtype)
}

function parseEntry (value: unknown, model: LoadedModel, param: string): EncoderResultEntry {
  if (typeof value !== 'object' || value === null || Array.isArray(value)) reject('an encoder result must be an object', param)
  const entry = value as Dict
  if (entry.modality !== undefined && entry.modality !== 'image') reject('"modality" must be "image"', `${param}.modality`)
  if (entry.protocol !== undefined && entry.protocol !== PROTOCOL_TCP) reject(`"protocol" must be ${PROTOCOL_TCP} (TCP)`, `${param}.protocol`)
  checkModel(entry, model, param)
  const numTokens = count(entry, 'num_tokens', param)
  const blocks = integers(entry, 'remote_block_ids', param)
  if (numTokens < 1 || numTokens > model.text.maxPositions) reject('"num_tokens" is out of range', `${param}.num_tokens`)
  if (blocks.length !== featureBlocksFor(numTokens)) {
    reject(`${numTokens} tokens take ${featureBlocksFor(numTokens)} feature blocks, ${blocks.length} are named`, `${param}.remote_block_ids`)
  }
  const grid = entry.grid === undefined ? [] : integers(entry, 'grid', param)
  if (!model.fits({ grid, numTokens })) {
    throw new EngineError('wrong_model', `a grid of [${grid.join(', ').slice(0, 60)}] is not ${numTokens} tokens in this model`, { param: `${param}.grid` })
  }
  return {
    contentHash: text(entry, 'content_hash', param),
    numTokens,
    grid,
    engineId: text(entry, 'remote_engine_id', param),
    epoch: count(entry, 'epoch', param),
    lease: text(entry, 'lease', param),
    blocks
  }
}

/**
 * The encoder result of each media item, matched by lease (`epd:<lease>` in the item's URL); an empty list when the
 * request brings none.
 * @throws EngineError `invalid_request` or `wrong_model`, naming the field, when they do not fit each other or this model.
 */
export function matchEncoderResults (body: Dict, items: readonly MediaItem[], model: LoadedModel): EncoderResultEntry[] {
  const value = body.encoder_result
  if (value === undefined || value === null) {
    const stray = items.find(item => item.source.kind === 'epd')
    if (stray !== undefined) throw new EngineError('invalid_request', 'an epd: URL names a lease, but the request has no "encoder_result"', { param: stray.param })
    return []
  }
  if (!Array.isArray(value)) reject('"encoder_result" must be a list', 'encoder_result')
  if (value.length !== items.length) reject(`the request has ${items.length} media items and ${value.length} encoder results`, 'encoder_result')
  const entries = new Map<string, EncoderResultEntry>()
  for (const [i, raw] of (value as unknown[]).entries()) {
    const entry = parseEntry(raw, model, `encoder_result[${i}]`)
    if (entries.has(entry.lease)) reject('two encoder results name the same lease', `encoder_result[${i}].lease`)
    entries.set(entry.lease, entry)
  }
  return items.map(({ source, param }) => {
    const entry = source.kind === 'epd' ? entries.get(source.lease) : undefined
    if (entry === undefined) reject('the media URL must be "epd:<lease>" with the lease of one encoder result', param)
    return entry
  })
}
