import { EngineError } from '../../service/errors.ts'
import type { MediaItem } from '../../encoder/media-parts.ts'
import { featureBlocksFor, type LoadedModel } from '../../models/family.ts'
import { count, dict, integers, reject, remoteBlocks, text, type Dict } from './wire-fields.ts'
import type { EncoderResultEntry } from '../sequence/remote.ts'

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
  const entry = dict(value, 'an encoder result', param)
  if (entry.modality !== undefined && entry.modality !== 'image') reject('"modality" must be "image"', `${param}.modality`)
  checkModel(entry, model, param)
  const numTokens = count(entry, 'num_tokens', param, { min: 1, max: model.text.maxPositions })
  const remote = remoteBlocks(entry, param)
  if (remote.blocks.length !== featureBlocksFor(numTokens)) {
    reject(`${numTokens} tokens take ${featureBlocksFor(numTokens)} feature blocks, ${remote.blocks.length} are named`, `${param}.remote_block_ids`)
  }
  const grid = entry.grid === undefined ? [] : integers(entry, 'grid', param)
  if (!model.fits({ grid, numTokens })) {
    throw new EngineError('wrong_model', `a grid of [${grid.join(', ').slice(0, 60)}] is not ${numTokens} tokens in this model`, { param: `${param}.grid` })
  }
  return { contentHash: text(entry, 'content_hash', param), numTokens, grid, ...remote }
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
