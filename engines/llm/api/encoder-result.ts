import type { MediaItem } from '../../encoder/media-parts.ts'
import { featureBlocksFor, type LoadedModel } from '../../models/family.ts'
import { EngineError } from '../../service/errors.ts'
import type { RemoteMedia } from '../sequence/prompt.ts'
import { readObject, refuse, requireInteger, requireIntegers, requireRemoteBlocks, requireText, type Json } from './fields.ts'

/**
 * The encoder results of the request (EncoderResultWire in adapters/wire/results.ts), one for each media item in the items'
 * order, matched by the lease in the item's URL (`epd:<lease>`). An empty list when the request has none.
 * @throws EngineError `invalid_request` or `wrong_model`, naming the member that does not fit the items or this model.
 */
export function matchEncoderResults (body: Json, items: readonly MediaItem[], model: LoadedModel): RemoteMedia[] {
  const value = body.encoder_result
  if (value === undefined || value === null) {
    const stray = items.find(item => item.source.kind === 'epd')
    if (stray !== undefined) refuse(stray.param, 'an epd: URL names a lease, but the request has no "encoder_result"')
    return []
  }
  if (!Array.isArray(value)) refuse('encoder_result', '"encoder_result" must be a list')
  if (value.length !== items.length) refuse('encoder_result', `the request has ${items.length} media items and ${value.length} encoder results`)
  const results = new Map<string, RemoteMedia>()
  for (const [i, entry] of (value as unknown[]).entries()) {
    const result = parseEncoderResult(entry, model, `encoder_result[${i}]`)
    const { lease } = result.source
    if (results.has(lease)) refuse(`encoder_result[${i}].lease`, 'two encoder results name the same lease')
    results.set(lease, result)
  }
  return items.map(({ source, param }) => {
    const result = source.kind === 'epd' ? results.get(source.lease) : undefined
    return result ?? refuse(param, 'the media URL must be "epd:<lease>" with the lease of one encoder result')
  })
}

/** One encoder result; `path` names it in errors. @throws EngineError as {@link matchEncoderResults} */
export function parseEncoderResult (value: unknown, model: LoadedModel, path: string): RemoteMedia {
  const entry = readObject(value, path, 'an encoder result')
  if (entry.modality !== undefined && entry.modality !== 'image') refuse(`${path}.modality`, '"modality" must be "image"')
  checkModel(entry, model, path)
  const numTokens = requireInteger(entry, 'num_tokens', path, { min: 1, max: model.text.maxPositions })
  const source = requireRemoteBlocks(entry, path)
  if (source.blocks.length !== featureBlocksFor(numTokens)) {
    refuse(`${path}.remote_block_ids`, `${numTokens} tokens take ${featureBlocksFor(numTokens)} feature blocks, ${source.blocks.length} are named`)
  }
  const grid = entry.grid === undefined ? [] : requireIntegers(entry, 'grid', path)
  if (!model.fits({ grid, numTokens })) {
    throw new EngineError('wrong_model', `a grid of [${grid.join(', ').slice(0, 60)}] is not ${numTokens} tokens in this model`, { param: `${path}.grid` })
  }
  // A hash is the encoder's word, not proof: what it sends under it is found again only as its own.
  return { contentHash: `${requireText(entry, 'content_hash', path)}@${source.engineId}#${source.epoch}`, numTokens, grid, source }
}

/** Features of another model would have another size, or be meaningless numbers. */
function checkModel (entry: Json, model: LoadedModel, path: string): void {
  for (const [key, ours] of [['hidden_size', model.hiddenSize], ['dtype', model.dtype]] as const) {
    if (entry[key] === ours) continue
    throw new EngineError('wrong_model', `the encoder result's ${key} is ${JSON.stringify(entry[key])?.slice(0, 60)}, this model takes ${String(ours)}`, { param: `${path}.${key}` })
  }
}
