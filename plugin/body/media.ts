import type { MediaItem, MediaPart } from '../../adapters/adapter.ts'
import { isEmbedded, MEDIA, type Modality } from '../../adapters/wire/media.ts'
import { fingerprint } from './fingerprint.ts'
import type { FoundMedia } from './media-collector.ts'
import { Pace } from './pace.ts'

interface PictureSize {
  readonly width: number
  readonly height: number
}

/** Bytes decoded at the start: every header but JPEG's fits in. */
const HEAD_BYTES = 48
/** JPEG segments looked at before giving up: thumbnails and colour profiles come in a few dozen at most. */
const MAX_SEGMENTS = 64
/** A data URL's header (`data:image/png;base64,`) is shorter than this, in bytes. */
const MAX_DATA_HEADER = 256
/** How much of a base64 text with escapes is decoded to look for a picture's size, in bytes. */
const ESCAPED_PREFIX = 64 * 1024

/** Pixels behind one vision token: 28 x 28, as in Qwen2.5-VL; InternVL's tiles come to 784 as well. */
const PIXELS_PER_TOKEN = 784
const MAX_TOKENS = 16_384
const UNKNOWN_TOKENS: Readonly<Record<Modality, number>> = { image: 1024, video: 8192, audio: 1024 }

/** An estimate of an item's vision tokens, for balancing only. `size` is known for inline pictures. */
function estimateTokens (size: PictureSize | undefined, modality: Modality): number {
  if (size === undefined) return UNKNOWN_TOKENS[modality]
  return Math.min(MAX_TOKENS, Math.max(1, Math.round(size.width * size.height / PIXELS_PER_TOKEN)))
}

/** Adds route key, size and token estimate to media parts. Gives way to other requests: where all letters are escapes a picture takes 4 ms. */
export async function describeMedia (bytes: Buffer, found: readonly FoundMedia[]): Promise<MediaItem[]> {
  const items: MediaItem[] = []
  const pace = new Pace()
  for (const { message, part, path, type, url: text, member, span, apart } of found) {
    if (pace.due()) await pace.rest()
    const modality = MEDIA.get(type)!
    // Media without a URL have an empty one: nothing is read there and nothing put.
    const { start, end, escaped } = text ?? { start: span.start, end: span.start, escaped: false }
    const size = modality === 'image' && text !== undefined ? inlineSize(bytes, start, end, escaped) : undefined
    const routeKey = text === undefined ? fingerprint(bytes, span.start, span.end) : fingerprint(bytes, start, end)
    const unencodable = text === undefined ? isEmbedded(type) ? 'embeddings' : 'media without a URL' : apart ? 'media outside of messages' : undefined
    items.push({
      index: items.length,
      message,
      part,
      path,
      modality,
      type,
      chat: member === undefined || member === type ? undefined : chatPart(modality, isBase64(bytes, start, end)),
      url: { start, end },
      span,
      routeKey,
      unencodable,
      remote: text !== undefined && !isInline(bytes, start, end, type),
      size,
      tokens: estimateTokens(size, modality)
    })
  }
  return items
}

/** Is the media in the body? A data URL is, and base64 text; an escape in its first letters makes it an address. */
function isInline (bytes: Buffer, start: number, end: number, type: string): boolean {
  return type === 'input_audio' || /^data:$/i.test(bytes.toString('latin1', start, start + 5)) || isBase64(bytes, start, end)
}

/** No URL: these have a colon near their beginning. Some clients write `\/` for every slash. */
function isBase64 (bytes: Buffer, start: number, end: number): boolean {
  return end - start >= 16 && /^(\\\/|[\w+/=-])+\\?$/.test(bytes.toString('latin1', start, start + 16))
}

/** A chat's spelling, around the URL. The bytes say what a picture is, whatever the type here. */
function chatPart (modality: Modality, base64: boolean): MediaPart {
  const type = `${modality}_url`
  return { before: `{"type":"${type}","${type}":{"url":"${base64 ? `data:${modality}/${modality === 'image' ? 'png' : '*'};base64,` : ''}`, after: '"}}' }
}

/** Size of a picture that is in the body itself: a data URL, or base64 text alone. */
function inlineSize (bytes: Buffer, start: number, end: number, escaped: boolean): PictureSize | undefined {
  const head = bytes.toString('latin1', start, Math.min(end, start + MAX_DATA_HEADER))
  let from = start
  if (/^data:/i.test(head)) {
    const header = /^data:[^,]*;\s*base64,/i.exec(head)
    if (header === null) return undefined
    from += header[0].length
  } else if (/^[a-z][a-z0-9+.-]*:/i.test(head)) return undefined
  return pictureSize(escaped ? unescapedWindow(bytes, from, end) : base64Window(bytes, from, end))
}

function base64Window (bytes: Buffer, start: number, end: number): ByteWindow {
  return (offset, length) => {
    // Four letters make three bytes: start at the group that holds the offset.
    const group = Math.floor(offset / 3)
    const from = start + group * 4
    const to = Math.min(end, start + Math.ceil((offset + length) / 3) * 4)
    if (from >= to) return Buffer.alloc(0)
    const skip = offset - group * 3
    return Buffer.from(bytes.toString('latin1', from, to), 'base64').subarray(skip, skip + length)
  }
}

/** Some clients write `\/` for every slash: only the beginning is unescaped and searched. */
function unescapedWindow (bytes: Buffer, start: number, end: number): ByteWindow {
  const text = bytes.toString('latin1', start, Math.min(end, start + ESCAPED_PREFIX))
  // An escape cut in two at the end is dropped.
  const plain = text.replace(/\\(?:u([0-9a-fA-F]{4})|([^u]))/g, (_match: string, hex: string | undefined, c: string | undefined) =>
    hex === undefined ? (c === '/' ? '/' : '') : String.fromCharCode(Number.parseInt(hex, 16))).replace(/\\.*$/s, '')
  const decoded = Buffer.from(plain, 'base64')
  return (offset, length) => decoded.subarray(offset, offset + length)
}

/** Gives `length` decoded bytes from `offset` on, or fewer at the end. */
type ByteWindow = (offset: number, length: number) => Buffer

/**
 * Width and height from a picture's own header (PNG, JPEG, WebP, GIF, BMP), reading a few dozen bytes here and there.
 * Undefined when the format is not recognised or the header makes no sense.
 */
function pictureSize (window: ByteWindow): PictureSize | undefined {
  const head = window(0, HEAD_BYTES)
  if (head.length < 16) return undefined
  const size = sizeByMagic(head, window)
  return size !== undefined && size.width > 0 && size.height > 0 ? size : undefined
}

function sizeByMagic (head: Buffer, window: ByteWindow): PictureSize | undefined {
  if (head[0] === 0xff && head[1] === 0xd8) return jpegSize(window)
  if (head.readUInt32BE(0) === 0x89504e47 && head.length >= 24) return { width: head.readUInt32BE(16), height: head.readUInt32BE(20) }
  const magic = head.toString('latin1', 0, 4)
  if (magic === 'GIF8') return { width: head.readUInt16LE(6), height: head.readUInt16LE(8) }
  // BMP: a negative height means rows from the top.
  if (magic.startsWith('BM') && head.length >= 26 && head.readUInt32LE(14) >= 40) return { width: head.readInt32LE(18), height: Math.abs(head.readInt32LE(22)) }
  if (magic === 'RIFF' && head.toString('latin1', 8, 12) === 'WEBP' && head.length >= 30) return webpSize(head)
  return undefined
}

function webpSize (head: Buffer): PictureSize | undefined {
  switch (head.toString('latin1', 12, 16)) {
    case 'VP8 ': return { width: head.readUInt16LE(26) & 0x3fff, height: head.readUInt16LE(28) & 0x3fff }
    case 'VP8L': {
      const bits = head.readUInt32LE(21)
      return { width: (bits & 0x3fff) + 1, height: ((bits >>> 14) & 0x3fff) + 1 }
    }
    case 'VP8X': return { width: head.readUIntLE(24, 3) + 1, height: head.readUIntLE(27, 3) + 1 }
    default: return undefined
  }
}

/** Hops from segment to segment until the frame header (SOF), without decoding what lies between. */
function jpegSize (window: ByteWindow): PictureSize | undefined {
  let offset = 2
  for (let n = 0; n < MAX_SEGMENTS; n++) {
    const segment = window(offset, 9)
    if (segment.length < 9 || segment[0] !== 0xff) return undefined
    const marker = segment[1]!
    if (marker === 0xff) {
      // Fill byte
      offset++
      continue
    }
    // SOF0..SOF15 but for DHT, JPG and DAC, which share the range.
    if (marker >= 0xc0 && marker <= 0xcf && marker !== 0xc4 && marker !== 0xc8 && marker !== 0xcc) {
      return { width: segment.readUInt16BE(7), height: segment.readUInt16BE(5) }
    }
    if (marker === 0xda || marker === 0xd9) return undefined
    offset += 2 + segment.readUInt16BE(2)
  }
  return undefined
}
