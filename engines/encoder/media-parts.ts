/** The media items of a request, with the position each is named by in errors. */
import { isObject, listOf, type Json } from '../../adapters/wire/json.ts'
import { isEmbedded, MEDIA, mediaUrl, partsOf, TEXT_PARTS } from '../../adapters/wire/media.ts'
import { LEASE_SCHEME } from '../../adapters/wire/results.ts'
import { EngineError } from '../service/errors.ts'
import type { PixelSettings } from '../models/index.ts'

/** Where an item's bytes come from. `epd` names a lease: the features are elsewhere already. */
export type MediaSource =
  | { readonly kind: 'data', readonly url: string }
  | { readonly kind: 'base64', readonly text: string }
  | { readonly kind: 'http', readonly url: string }
  | { readonly kind: 'file', readonly url: string }
  | { readonly kind: 'epd', readonly lease: string }

export interface MediaItem {
  /** Position among the request's media items, from 0. */
  readonly index: number
  readonly message: number
  readonly part: number
  /** `messages[0].content[1]` */
  readonly param: string
  readonly source: MediaSource
  readonly settings: PixelSettings
}

/** Parts of other APIs that hold no media: whoever reads the text refuses them. */
const WITHOUT_MEDIA = new Set(['tool_use', 'tool_reference', 'redacted_thinking'])
/** Other servers' parts beside text and media. */
const OTHER_PARTS = new Set(['time_series', 'time_series_url', 'file', 'input_file', 'document'])
const PIXEL_KEYS = ['max_dynamic_patch', 'min_pixels', 'max_pixels', 'resized_height', 'resized_width'] as const
const MAX_PIXEL_VALUE = 1_000_000_000

/** Pixel keys of `source`, checked; `base` gives those it leaves out. */
function readSettings (source: Json, base: PixelSettings, param: string): PixelSettings {
  const settings: { -readonly [K in keyof PixelSettings]: PixelSettings[K] } = { ...base }
  for (const key of PIXEL_KEYS) {
    const value = source[key]
    if (value === undefined || value === null) continue
    if (typeof value !== 'number' || !Number.isSafeInteger(value) || value < 1 || value > MAX_PIXEL_VALUE) {
      throw new EngineError('invalid_request', `"${key}" must be a positive integer`, { param: `${param}.${key}` })
    }
    settings[key] = value
  }
  return settings
}

/** `mm_processor_kwargs: { image: {...} }`, or the keys directly in it. */
function requestSettings (body: Json): PixelSettings {
  const { mm_processor_kwargs: kwargs } = body
  if (!isObject(kwargs)) return {}
  const flat = readSettings(kwargs, {}, 'mm_processor_kwargs')
  return isObject(kwargs.image) ? readSettings(kwargs.image, flat, 'mm_processor_kwargs.image') : flat
}

function toSource (text: string, type: string, param: string): MediaSource {
  const scheme = /^([a-z][a-z0-9+.-]*):/i.exec(text.slice(0, 32))?.[1]?.toLowerCase()
  if (scheme === 'data') return { kind: 'data', url: text }
  if (scheme === 'http' || scheme === 'https') return { kind: 'http', url: text }
  if (scheme === 'file') return { kind: 'file', url: text }
  if (scheme === 'epd') return { kind: 'epd', lease: text.slice(LEASE_SCHEME.length) }
  if (scheme === undefined && type !== 'image_url' && text.length > 0) return { kind: 'base64', text }
  throw new EngineError('invalid_media', 'a media URL must begin with data:, https:, http: or file:', { param })
}

/** A media part's source and settings; these stand beside `type` or in the object that holds the URL. */
function readMedia (part: Json, type: string, base: PixelSettings, param: string): { source: MediaSource, settings: PixelSettings } {
  if (MEDIA.get(type) !== 'image' || isEmbedded(type)) unsupportedPart(type, param)
  const found = mediaUrl(part, type)
  if (found === undefined) throw new EngineError('invalid_request', `"${type}" must be a string or an object with "url"`, { param })
  const value = part[found.member]
  const beside = readSettings(part, base, param)
  const settings = isObject(value) ? readSettings(value, beside, `${param}.${found.member}`) : beside
  return { source: toSource(found.url, type, param), settings }
}

function unsupportedPart (type: string, param: string): never {
  throw new EngineError('unsupported', `content parts of type "${type}" are not supported by this model`, { param })
}

/** Text, or a part around others. */
function checkOther (part: unknown, param: string): void {
  if (typeof part === 'string') return
  if (!isObject(part) || typeof part.type !== 'string') throw new EngineError('invalid_request', 'a content part must be a string or an object with a "type"', { param })
  const { type } = part
  if (TEXT_PARTS.has(type) || WITHOUT_MEDIA.has(type) || Array.isArray(part.content)) return
  if (OTHER_PARTS.has(type)) unsupportedPart(type, param)
  throw new EngineError('invalid_request', `content part type "${type.slice(0, 60)}" is unknown`, { param })
}

/** @default 64 media items in one request */
export const DEFAULT_MAX_ITEMS = 64

/**
 * The media items of a chat request's body, in order of appearance. Nothing is fetched or decoded.
 * @throws EngineError `invalid_request`, `invalid_media` or `unsupported`, with the part as `param`.
 */
export function collectMedia (body: unknown, options: { maxItems?: number } = {}): MediaItem[] {
  if (!isObject(body)) throw new EngineError('invalid_request', 'the body must be a JSON object')
  const { messages } = body
  if (!Array.isArray(messages) && !Array.isArray(body.input)) throw new EngineError('invalid_request', '"messages" must be an array', { param: 'messages' })
  const stray = listOf(messages).findIndex(message => !isObject(message))
  if (stray !== -1) throw new EngineError('invalid_request', 'a message must be an object', { param: `messages[${stray}]` })
  const { maxItems = DEFAULT_MAX_ITEMS } = options
  const base = requestSettings(body)
  const items: MediaItem[] = []
  for (const { part, message, index, path: param, type, apart } of partsOf(body)) {
    if (apart) {
      if (type === undefined) continue
      throw new EngineError('unsupported', 'media are taken in the parts of messages only', { param })
    }
    if (type === undefined) {
      checkOther(part, param)
      continue
    }
    if (items.length >= maxItems) throw new EngineError('invalid_request', `too many media items: at most ${maxItems} in one request`, { param })
    items.push({ index: items.length, message, part: index, param, ...readMedia(part as Json, type, base, param) })
  }
  return items
}

/** The settings as a part of the content hash: equal settings, equal text. */
export function settingsKey (settings: PixelSettings): string {
  return PIXEL_KEYS.filter(key => settings[key] !== undefined).map(key => `${key}=${settings[key]}`).join('&')
}
