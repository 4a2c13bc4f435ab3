/**
 * Pictures as families need them: opened from their header with every limit checked, then resized to 8-bit RGB.
 * Decoding runs in libuv's threads, not in the caller's.
 */
import type { Sharp, SharpConstructor, SharpOptions } from 'sharp'
import { requireOptional } from '../service/optional.ts'
import { bmpSize, decodeBmp } from './bmp.ts'
import { enlarge } from './enlarge.ts'
import { PictureError, type PictureSize } from './family.ts'
import { sniffPicture } from './sniff.ts'

/** Largest picture that is decoded, pixels: a header that claims more is refused before anything is allocated. */
export const MAX_PICTURE_PIXELS = 100_000_000
/** The same for BMP, which is decoded as a whole and whose runs of pixels are a bomb's: three times what an item's bytes can hold of others. */
const MAX_BMP_PIXELS = 32_000_000
/** Ratio of the long side to the short one: beyond it a resize to tiles shows nothing. */
export const MAX_ASPECT_RATIO = 200

export interface Picture {
  /** As seen, after EXIF orientation. */
  readonly size: PictureSize
  /** The whole picture stretched to a size: rows of RGB bytes. */
  resize (size: PictureSize): Promise<Uint8Array>
}

/** What is said of a decoder's complaint: its text, in one line, without paths of ours. */
function pictureError (cause: unknown): PictureError {
  const reason = (cause instanceof Error ? cause.message : String(cause)).split('\n')[0] ?? ''
  return new PictureError(`the picture can't be decoded: ${reason}`, { cause })
}

function checkSize (width: number, height: number, max = MAX_PICTURE_PIXELS): void {
  if (!(width > 0 && height > 0)) throw new PictureError('the picture has no size')
  if (width * height > max) {
    throw new PictureError(`the picture is too large: ${width}x${height} pixels, at most ${max} are decoded`)
  }
  if (Math.max(width, height) / Math.min(width, height) > MAX_ASPECT_RATIO) {
    throw new PictureError(`the picture is too narrow: ${width}x${height} pixels, sides may differ by a factor of ${MAX_ASPECT_RATIO}`)
  }
}

/** One channel to three, where a grey picture stays grey. */
function toRgb (data: Uint8Array, channels: number): Uint8Array {
  if (channels === 3) return data
  const out = new Uint8Array(data.length / channels * 3)
  for (let from = 0, to = 0; from < data.length; from += channels, to += 3) {
    out[to] = data[from] as number
    out[to + 1] = data[channels > 2 ? from + 1 : from] as number
    out[to + 2] = data[channels > 2 ? from + 2 : from] as number
  }
  return out
}

async function render (source: Sharp, size: PictureSize, hasAlpha: boolean): Promise<Uint8Array> {
  const { width, height } = size
  try {
    const oriented = source.autoOrient()
    const opaque = hasAlpha ? oriented.flatten({ background: '#ffffff' }) : oriented
    const { data, info } = await opaque
      .resize(width, height, { fit: 'fill', kernel: 'cubic', fastShrinkOnLoad: false })
      .toColourspace('srgb')
      .raw({ depth: 'uchar' })
      .toBuffer({ resolveWithObject: true })
    return toRgb(data, info.channels)
  } catch (err) {
    throw pictureError(err)
  }
}

/**
 * Opens a picture: reads its header only.
 * @throws PictureError when it is none of the formats read here, is corrupt, or is too large.
 */
export async function openPicture (bytes: Uint8Array): Promise<Picture> {
  const format = sniffPicture(bytes)
  if (format === undefined) throw new PictureError('the bytes are no picture of a supported format (JPEG, PNG, WebP, GIF, TIFF, AVIF, BMP)')
  const sharp = requireOptional('sharp')
  if (format === 'image/bmp') return openBmp(bytes, sharp)
  // What libjpeg only warns of leaves the picture whole: Pillow takes it as well.
  const input: SharpOptions = { limitInputPixels: MAX_PICTURE_PIXELS, failOn: 'error', sequentialRead: true }
  // The limit is checked below on the header's figures; sharp itself would only notice when it decodes.
  const header = await sharp(bytes, { ...input, limitInputPixels: false }).metadata().catch((err: unknown) => { throw pictureError(err) })
  checkSize(header.width, header.pageHeight ?? header.height)
  const { width, height: whole } = header.autoOrient
  const own: PictureSize = { width, height: header.pageHeight ?? whole }
  return pictureOf(own, () => sharp(bytes, input), header.hasAlpha === true)
}

function openBmp (bytes: Uint8Array, sharp: SharpConstructor): Picture {
  const size = bmpSize(bytes)
  checkSize(size.width, size.height, MAX_BMP_PIXELS)
  const { data, channels, width, height } = decodeBmp(bytes)
  return pictureOf(size, () => sharp(data, { raw: { width, height, channels } }), channels === 4)
}

function pictureOf (own: PictureSize, decode: () => Sharp, hasAlpha: boolean): Picture {
  return {
    size: own,
    resize: async size => {
      const shrunk = { width: Math.min(own.width, size.width), height: Math.min(own.height, size.height) }
      return enlarge(await render(decode(), shrunk, hasAlpha), shrunk, size)
    }
  }
}
