/** Base64 of a request, read strictly: what a lenient decoder would drop in silence is an error. */
import { sniffPicture } from '../models/index.ts'
import { MediaError } from './media-error.ts'

/** A picture's MIME type in a data URL may be spelt so, or be left open. */
const ALIASES: Readonly<Record<string, string>> = { 'image/jpg': 'image/jpeg', 'image/pjpeg': 'image/jpeg', 'image/x-png': 'image/png', 'image/heif': 'image/avif' }
const UNSTATED = new Set(['', 'application/octet-stream', 'image/*'])

function decodedLength (text: string): number {
  let end = text.length
  while (end > 0 && text.charCodeAt(end - 1) === 0x3d) end--
  return text.length - end > 2 ? -1 : Math.floor(end * 3 / 4)
}

/**
 * Decodes base64. Line breaks, which some encoders insert, are allowed; anything else is an error.
 * @throws MediaError
 */
export function decodeBase64 (text: string): Buffer {
  // Buffer.from skips what is no base64, so a shorter result shows it without a scan of its own.
  let bytes = Buffer.from(text, 'base64')
  if (bytes.length !== decodedLength(text)) {
    const compact = text.replace(/[\r\n\t ]+/g, '')
    bytes = Buffer.from(compact, 'base64')
    if (bytes.length !== decodedLength(compact)) throw new MediaError('invalid_media', 'the base64 text is not valid')
  }
  if (bytes.length === 0) throw new MediaError('invalid_media', 'the picture is empty')
  return bytes
}

/** Is the stated MIME type what the bytes are? */
export function checkMime (stated: string, bytes: Uint8Array): void {
  const found = sniffPicture(bytes)
  if (found === undefined) throw new MediaError('invalid_media', 'the bytes are no picture of a supported format (JPEG, PNG, WebP, GIF, TIFF, AVIF)')
  const mime = stated.trim().toLowerCase()
  if (!UNSTATED.has(mime) && (ALIASES[mime] ?? mime) !== found) {
    throw new MediaError('invalid_media', `the data URL says ${mime.slice(0, 60)}, the bytes are ${found}`)
  }
}

/**
 * The picture in a data URL.
 * @throws MediaError when it is not base64, not valid, or not what its MIME type says.
 */
export function decodeDataUrl (url: string): Buffer {
  const comma = url.indexOf(',')
  if (comma < 0 || comma > 256) throw new MediaError('invalid_media', 'the data URL has no data')
  const [mime = '', ...parameters] = url.slice('data:'.length, comma).split(';')
  if (parameters.at(-1)?.trim().toLowerCase() !== 'base64') throw new MediaError('invalid_media', 'the data URL must be base64')
  const bytes = decodeBase64(url.slice(comma + 1))
  checkMime(mime, bytes)
  return bytes
}
