export interface PictureSize {
  readonly width: number
  readonly height: number
}

/** Bytes decoded at the start: every header but JPEG's fits in. */
const HEAD_BYTES = 48
/** JPEG segments looked at before giving up: thumbnails and colour profiles come in a few dozen at most. */
const MAX_SEGMENTS = 64

/** Gives `length` decoded bytes from `offset` on, or fewer at the end. */
export type ByteWindow = (offset: number, length: number) => Buffer

/**
 * Width and height from a picture's own header (PNG, JPEG, WebP, GIF), reading a few dozen bytes here and there.
 * Undefined when the format is not recognised or the header makes no sense.
 */
export function pictureSize (window: ByteWindow): PictureSize | undefined {
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
