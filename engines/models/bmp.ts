/**
 * BMP, which sharp does not read: every kind that Pillow reads, with the same pixels. Only rows and a palette, so that a decoder
 * of our own takes less code than the checks around a library's.
 */
import { PictureError, type PictureSize } from './family.ts'

/** Pixels of a picture: rows of RGB or RGBA bytes, from the top. */
export interface Pixels extends PictureSize {
  readonly channels: 3 | 4
  readonly data: Uint8Array
}

interface Header extends PictureSize {
  readonly topDown: boolean
  readonly bits: number
  readonly compression: number
  /** Bits of red, green, blue and alpha in a pixel of 16, 24 or 32 bits. */
  readonly masks: readonly [number, number, number, number]
  /** RGB of each index. */
  readonly palette: Uint8Array
  readonly start: number
}

const RAW = 0
const RLE8 = 1
const RLE4 = 2
const BITFIELDS = 3
const HEADERS = new Set([12, 40, 52, 56, 64, 108, 124])
const DEPTHS = new Set([1, 4, 8, 16, 24, 32])
/** Where the masks stand in headers that have them, and behind one that has none. */
const MASKS_AT = 54
const FILE_HEADER = 14

/** Of the many files that begin with the letters BM, those with a header of a known length. */
export function isBmp (bytes: Uint8Array): boolean {
  return bytes[0] === 0x42 && bytes[1] === 0x4d && bytes.length > FILE_HEADER + 12 && HEADERS.has(viewOf(bytes).getUint32(FILE_HEADER, true))
}

export function bmpSize (bytes: Uint8Array): PictureSize {
  const { width, height } = readHeader(bytes)
  return { width, height }
}

/** @throws PictureError when it is cut, or of a kind that Pillow does not read either. Check the size first. */
export function decodeBmp (bytes: Uint8Array): Pixels {
  const header = readHeader(bytes)
  const { bits, compression } = header
  if (compression === RLE8 || compression === RLE4) return fromIndices(header, unpackRuns(bytes, header))
  const rowBytes = ((header.width * bits + 31) >>> 5) * 4
  if (header.start + rowBytes * header.height > bytes.length) throw new PictureError('the picture can\'t be decoded: the BMP is cut')
  if (bits <= 8) return fromIndices(header, unpackIndices(bytes, header, rowBytes))
  return fromMasks(bytes, header, rowBytes)
}

function viewOf (bytes: Uint8Array): DataView {
  return new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength)
}

function readHeader (bytes: Uint8Array): Header {
  const view = viewOf(bytes)
  try {
    const length = view.getUint32(FILE_HEADER, true)
    const old = length === 12
    const u16 = (at: number): number => view.getUint16(FILE_HEADER + at, true)
    const u32 = (at: number): number => view.getUint32(FILE_HEADER + at, true)
    const height = old ? u16(6) : view.getInt32(FILE_HEADER + 8, true)
    const bits = u16(old ? 10 : 14)
    const compression = old ? RAW : u32(16)
    if (!DEPTHS.has(bits)) throw new PictureError(`the picture can't be decoded: a BMP of ${bits} bits a pixel is not supported`)
    if (compression > BITFIELDS) throw new PictureError(`the picture can't be decoded: BMP compression ${compression} is not supported`)
    const colours = bits > 8 ? 0 : (old ? 0 : u32(32)) || 1 << bits
    const entry = old ? 3 : 4
    const behindHeader = FILE_HEADER + length + (compression === BITFIELDS && length === 40 ? 12 : 0)
    const palette = new Uint8Array(256 * 3)
    for (let i = 0; i < Math.min(colours, 256); i++) {
      for (let c = 0; c < 3; c++) palette[i * 3 + c] = bytes[behindHeader + i * entry + 2 - c] ?? 0
    }
    return {
      width: old ? u16(4) : Math.max(0, view.getInt32(FILE_HEADER + 4, true)),
      height: Math.abs(height),
      topDown: height < 0,
      bits,
      compression,
      masks: masksOf(view, bits, compression, length),
      palette,
      start: view.getUint32(10, true) || behindHeader + colours * entry
    }
  } catch (err) {
    if (err instanceof PictureError) throw err
    throw new PictureError('the picture can\'t be decoded: the BMP is cut', { cause: err })
  }
}

function masksOf (view: DataView, bits: number, compression: number, length: number): Header['masks'] {
  if (compression === BITFIELDS) {
    const mask = (i: number): number => view.getUint32(MASKS_AT + i * 4, true)
    const alpha = length >= 56 ? mask(3) : 0
    if (mask(0) !== 0) return [mask(0), mask(1), mask(2), alpha]
  }
  return bits === 16 ? [0x7c00, 0x3e0, 0x1f, 0] : [0xff0000, 0xff00, 0xff, 0]
}

/** Row of the result for a row of the file. */
function rowOf ({ topDown, height }: Header, y: number): number {
  return topDown ? y : height - 1 - y
}

function fromIndices (header: Header, indices: Uint8Array): Pixels {
  const { width, height, palette } = header
  const data = new Uint8Array(width * height * 3)
  for (let y = 0; y < height; y++) {
    let to = rowOf(header, y) * width * 3
    for (let from = y * width; from < (y + 1) * width; from++) {
      const colour = indices[from]! * 3
      data[to++] = palette[colour]!
      data[to++] = palette[colour + 1]!
      data[to++] = palette[colour + 2]!
    }
  }
  return { width, height, channels: 3, data }
}

/** One byte a pixel from 1, 4 or 8 bits, the leftmost pixel in the highest bits. */
function unpackIndices (bytes: Uint8Array, { width, height, bits, start }: Header, rowBytes: number): Uint8Array {
  const indices = new Uint8Array(width * height)
  const mask = (1 << bits) - 1
  for (let y = 0; y < height; y++) {
    const row = start + y * rowBytes
    for (let x = 0; x < width; x++) {
      const bit = x * bits
      indices[y * width + x] = (bytes[row + (bit >> 3)]! >> (8 - bits - (bit & 7))) & mask
    }
  }
  return indices
}

/** Runs of equal pixels (RLE). What no run covers has index 0, also where the runs end early. */
function unpackRuns (bytes: Uint8Array, { width, height, compression, start }: Header): Uint8Array {
  const indices = new Uint8Array(width * height)
  const halves = compression === RLE4
  const rightOf = (to: number): number => to - to % width + width
  let to = 0
  for (let at = start; to < indices.length && at + 1 < bytes.length;) {
    const count = bytes[at++]!
    const value = bytes[at++]!
    if (count > 0) {
      const end = Math.min(to + count, rightOf(to))
      for (let i = 0; to < end; i++) indices[to++] = !halves ? value : i % 2 === 0 ? value >> 4 : value & 15
    } else if (value === 0) {
      if (to % width !== 0) to = rightOf(to)
    } else if (value === 1) break
    else if (value === 2) {
      to += (bytes[at] ?? 0) + (bytes[at + 1] ?? 0) * width
      at += 2
    } else {
      for (let i = 0; i < value && to < indices.length; i++) {
        const byte = bytes[at + (halves ? i >> 1 : i)] ?? 0
        indices[to++] = !halves ? byte : i % 2 === 0 ? byte >> 4 : byte & 15
      }
      const length = halves ? (value + 1) >> 1 : value
      // Runs begin at even offsets.
      at += length + length % 2
    }
  }
  return indices
}

function fromMasks (bytes: Uint8Array, header: Header, rowBytes: number): Pixels {
  const { width, height, bits, masks, start } = header
  const size = bits / 8
  const channels = masks[3] === 0 ? 3 : 4
  const fields = masks.slice(0, channels).map(mask => {
    const shift = mask === 0 ? 0 : 31 - Math.clz32(mask & -mask)
    return { shift, max: (mask >>> shift) || 1, mask: mask >>> shift }
  })
  const data = new Uint8Array(width * height * channels)
  for (let y = 0; y < height; y++) {
    let to = rowOf(header, y) * width * channels
    let from = start + y * rowBytes
    for (let x = 0; x < width; x++, from += size) {
      let pixel = bytes[from]! | bytes[from + 1]! << 8
      if (size > 2) pixel |= bytes[from + 2]! << 16
      if (size > 3) pixel |= bytes[from + 3]! << 24
      for (const { shift, max, mask } of fields) data[to++] = Math.floor(((pixel >>> shift) & mask) * 255 / max)
    }
  }
  return { width, height, channels, data }
}
