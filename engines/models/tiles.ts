/** Cutting a resized picture into tiles. */
import type { PictureSize } from './family.ts'
import type { Normaliser, PixelArray } from './normaliser.ts'

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
