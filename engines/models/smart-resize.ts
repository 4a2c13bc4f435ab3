/** How Qwen-VL's processor chooses the size a picture is resized to. */
import type { PictureSize } from './family.ts'
import { MAX_ASPECT_RATIO } from './picture.ts'

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
