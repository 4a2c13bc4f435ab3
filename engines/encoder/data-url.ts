/** Base64 of a request, read strictly: what a lenient decoder would drop in silence is an error. */
import { MediaError } from './media-error.ts'

function decodedLength (text: string): number {
  let end = text.length
  while (end > 0 && text.charCodeAt(end - 1) === 0x3d) end--
  return text.length - end > 2 ? -1 : Math.floor(end * 3 / 4)
}

/** Encoders break lines after 76 characters at most. */
const LINE = 4096

/**
 * Decodes base64. Line breaks, which some encoders insert, are allowed; anything else is an error.
 * @throws MediaError
 */
export function decodeBase64 (text: string): Buffer {
  // Buffer.from skips what is no base64, so a shorter result shows it without a scan of its own.
  let bytes = Buffer.from(text, 'base64')
  if (bytes.length !== decodedLength(text)) {
    // Looking through all of a long text takes as long as decoding it.
    if (!/\s/.test(text.slice(0, LINE)) && !/\s$/.test(text.slice(-LINE))) throw new MediaError('invalid_media', 'the base64 text is not valid')
    const compact = text.replace(/[\r\n\t ]+/g, '')
    bytes = Buffer.from(compact, 'base64')
    if (bytes.length !== decodedLength(compact)) throw new MediaError('invalid_media', 'the base64 text is not valid')
  }
  if (bytes.length === 0) throw new MediaError('invalid_media', 'the picture is empty')
  return bytes
}

/**
 * The bytes in a data URL. Its MIME type is not looked at: what the bytes are decides, and clients write anything there.
 * @throws MediaError when it is not base64, or not valid.
 */
export function decodeDataUrl (url: string): Buffer {
  const comma = url.indexOf(',')
  if (comma < 0 || comma > 256) throw new MediaError('invalid_media', 'the data URL has no data')
  if (!/;\s*base64\s*$/i.test(url.slice(0, comma))) throw new MediaError('invalid_media', 'the data URL must be base64')
  return decodeBase64(url.slice(comma + 1))
}
