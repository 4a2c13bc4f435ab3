/** Cutting a resized picture into tiles and normalising them: the part of preprocessing that is plain arithmetic. */
import { toFloat16 } from '../runtime/float16.ts'
import type { PictureSize } from './family.ts'

/** Per channel, the value of each of the 256 levels: `(v * rescale - mean) / std`, in the element type of the graph. */
export interface Normaliser {
  readonly type: 'float32' | 'float16'
  readonly tables: ReadonlyArray<Float32Array | Uint16Array>
}

export type PixelArray = Float32Array<ArrayBuffer> | Uint16Array<ArrayBuffer>

export function makeNormaliser (type: 'float32' | 'float16', rescale: number, mean: readonly number[], std: readonly number[]): Normaliser {
  const tables = mean.map((m, channel) => {
    // Rounded after each operation, as single-precision preprocessors do it.
    const level = (v: number): number => Math.fround(Math.fround(Math.fround(v * rescale) - Math.fround(m)) / Math.fround(std[channel] ?? 1))
    const values = Float32Array.from({ length: 256 }, (_, v) => level(v))
    return type === 'float32' ? values : Uint16Array.from(values, toFloat16)
  })
  return { type, tables }
}

export function makePixels (normaliser: Normaliser, length: number): PixelArray {
  return normaliser.type === 'float32' ? new Float32Array(length) : new Uint16Array(length)
}

/**
 * Writes the tiles of `rgb`, a picture of `grid` tiles, row by row into `out` from element `offset`: each as three
 * planes (CHW). Returns the element after the last.
 */
export function writeTiles (rgb: Uint8Array, grid: { columns: number, rows: number }, tile: PictureSize, normaliser: Normaliser, out: PixelArray, offset: number): number {
  const { width, height } = tile
  const stride = grid.columns * width * 3
  let at = offset
  for (let row = 0; row < grid.rows; row++) {
    for (let column = 0; column < grid.columns; column++) {
      for (let channel = 0; channel < 3; channel++) {
        const table = normaliser.tables[channel] as Float32Array
        for (let y = 0; y < height; y++) {
          let from = (row * height + y) * stride + column * width * 3 + channel
          for (let x = 0; x < width; x++, from += 3) out[at++] = table[rgb[from] as number] as number
        }
      }
    }
  }
  return at
}
