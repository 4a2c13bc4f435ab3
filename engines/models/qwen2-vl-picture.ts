import type { PictureSize } from './family.ts'
import { MAX_ASPECT_RATIO } from './picture.ts'
import type { Normaliser, PixelArray } from './normaliser.ts'

/** How Qwen-VL's processor chooses the size a picture is resized to. */

/** Pixels a resized picture has at least and at most. */
export interface PixelBudget {
  readonly min: number
  readonly max: number
}

/** As Python rounds: a half goes to the even neighbour. */
function roundHalfEven (value: number): number {
  const floor = Math.floor(value)
  if (value - floor !== 0.5) return Math.round(value)
  return floor % 2 === 0 ? floor : floor + 1
}

/**
 * Sides that are multiples of `factor`, with a number of pixels in the budget and the aspect ratio kept as well as that
 * allows. Of a very narrow picture the short side is one `factor` whatever the budget says.
 */
export function smartResize ({ width, height }: PictureSize, factor: number, { min, max }: PixelBudget): PictureSize {
  const rounded = { width: roundHalfEven(width / factor) * factor, height: roundHalfEven(height / factor) * factor }
  if (rounded.width * rounded.height > max) {
    const shrink = Math.sqrt((height * width) / max)
    const side = (length: number): number => Math.max(factor, Math.floor(length / shrink / factor) * factor)
    return { width: side(width), height: side(height) }
  }
  if (rounded.width * rounded.height < min) {
    const grow = Math.sqrt(min / (height * width))
    const side = (length: number): number => Math.ceil(length * grow / factor) * factor
    return { width: side(width), height: side(height) }
  }
  return rounded
}

/** Most pixels {@link smartResize} can give: the budget, or what narrow pictures come to by rounding their short side up. */
export function mostPixels (factor: number, { min, max }: PixelBudget): number {
  // A short side that was rounded down makes the ratio half as large again, and sizes of a request's own are rounded twice.
  const ratio = MAX_ASPECT_RATIO * 1.5
  const shrunk = factor * Math.sqrt(max * ratio)
  const grown = (Math.sqrt(min * ratio) + factor) * (Math.sqrt(min / ratio) + factor)
  return Math.max(max, shrunk, grown)
}

/** Cutting a resized picture into patches as Qwen-VL's vision encoder takes them. */

export interface PatchLayout {
  /** Side of a patch, pixels. */
  readonly patch: number
  /** Patches in a row and in a column that become one token together. */
  readonly merge: number
  /** Frames in a patch; a picture repeats itself. */
  readonly frames: number
}

/** Numbers in one patch. */
export function patchLength ({ patch, frames }: PatchLayout): number {
  return 3 * frames * patch * patch
}

/**
 * Writes the patches of `rgb` to `out`, one row of numbers each: those that are merged stand together, square by square,
 * row by row. In a patch come the channels, in a channel the frames, in a frame the lines.
 */
export function writePatches (rgb: Uint8Array, size: PictureSize, layout: PatchLayout, normaliser: Normaliser, out: PixelArray): void {
  const { patch, merge, frames } = layout
  const rows = size.height / patch
  const columns = size.width / patch
  let at = 0
  for (let top = 0; top < rows; top += merge) {
    for (let left = 0; left < columns; left += merge) {
      for (let inner = 0; inner < merge * merge; inner++) {
        const y = (top + Math.floor(inner / merge)) * patch
        const x = (left + inner % merge) * patch
        for (let channel = 0; channel < 3; channel++) at = writeFrames(rgb, (y * size.width + x) * 3 + channel, size.width, patch, frames, normaliser.tables[channel] as Float32Array, out, at)
      }
    }
  }
}

/** One channel of one patch, which begins at `from`, as often as there are frames. Returns the element after the last. */
function writeFrames (rgb: Uint8Array, from: number, width: number, patch: number, frames: number, table: Float32Array | Uint16Array, out: PixelArray, to: number): number {
  let at = to
  for (let line = 0; line < patch; line++) {
    for (let column = 0, source = from + line * width * 3; column < patch; column++, source += 3) out[at++] = table[rgb[source] as number] as number
  }
  const plane = at - to
  for (let frame = 1; frame < frames; frame++, at += plane) out.copyWithin(at, to, to + plane)
  return at
}
