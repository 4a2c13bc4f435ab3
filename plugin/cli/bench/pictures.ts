import { promisify } from 'node:util'
import { crc32, deflate } from 'node:zlib'
import { seeded } from './random.ts'

export interface PictureOptions {
  readonly seed: number
  /** Pixels. */
  readonly width: number
  readonly height: number
  readonly format: 'png' | 'jpeg'
}

/** Gives the picture of a number as a data URL; the same for the same options and number. */
export type Pictures = (id: number) => Promise<string>

/** Edge of a square of one colour. With it a picture has about as many bytes as a photo of its size as JPEG. */
const CELL = 4
const SIGNATURE = Buffer.from('89504e470d0a1a0a', 'hex')
const JPEG_QUALITY = 85
/** PNG's ways to write a line: differences to the pixel before, or to the line above. */
const SUB = 1
const UP = 2

const deflated = promisify(deflate)
/** Not of the type of its name: whoever has not installed it must be able to bundle and compile without. */
const SHARP: string = 'sharp'

/** @throws Error when pictures are to be JPEG and there is no encoder */
export async function pictureMaker ({ seed, width, height, format }: PictureOptions): Promise<Pictures> {
  const png = (id: number): Promise<Buffer> => pngOf(width, height, seeded(seed, id))
  if (format === 'png') return async id => dataUrl('image/png', await png(id))
  const { default: sharp } = await (import(SHARP) as Promise<typeof import('sharp')>).catch(() => { throw new Error('JPEG pictures need the package sharp: npm install sharp, or ask for PNG') })
  return async id => dataUrl('image/jpeg', await sharp(await png(id)).jpeg({ quality: JPEG_QUALITY }).toBuffer())
}

/**
 * Squares of random colours. The compression, which is most of the work, runs on zlib's threads, and the rest costs the
 * event loop a fraction of a millisecond.
 */
async function pngOf (width: number, height: number, random: () => number): Promise<Buffer> {
  const stride = 1 + width * 3
  // Zeros: the same colour again.
  const lines = Buffer.alloc(stride * height)
  for (let y = 0; y < height; y++) {
    lines[y * stride] = y % CELL === 0 ? SUB : UP
    if (y % CELL !== 0) continue
    for (let x = 0; x < width; x += CELL) {
      const value = Math.floor(random() * 0x1000000)
      lines.writeUIntBE(value, y * stride + 1 + x * 3, 3)
    }
  }
  const header = Buffer.alloc(13)
  header.writeUInt32BE(width, 0)
  header.writeUInt32BE(height, 4)
  // Eight bits each of red, green and blue.
  header.set([8, 2, 0, 0, 0], 8)
  return Buffer.concat([SIGNATURE, ...chunk('IHDR', header), ...chunk('IDAT', await deflated(lines, { level: 1 })), ...chunk('IEND', Buffer.alloc(0))])
}

function chunk (type: string, data: Buffer): Buffer[] {
  const length = Buffer.alloc(4)
  length.writeUInt32BE(data.length)
  const name = Buffer.from(type, 'latin1')
  const sum = Buffer.alloc(4)
  sum.writeUInt32BE(crc32(data, crc32(name)))
  return [length, name, data, sum]
}

function dataUrl (mime: string, bytes: Buffer): string {
  return `data:${mime};base64,${bytes.toString('base64')}`
}
