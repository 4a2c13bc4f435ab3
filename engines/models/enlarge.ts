/**
 * Bicubic enlarging as Pillow does it, to the bit. Models were trained with it, and libvips, which does everything else,
 * moves a picture by half a pixel when it enlarges it.
 */
import type { PictureSize } from './family.ts'

/** Pixels on either side that the filter looks at, and both together. */
const SUPPORT = 2
const TAPS = 2 * SUPPORT
/** Weights are fixed-point numbers with so many binary places. */
const PLACES = 22
const HALF = 2 ** (PLACES - 1)

/** Cubic convolution with a = -0.5. */
function cubic (distance: number): number {
  const x = Math.abs(distance)
  if (x < 1) return (1.5 * x - 2.5) * x * x + 1
  return x < 2 ? -0.5 * (((x - 5) * x + 8) * x - 4) : 0
}

interface Weights {
  /** The first pixel that each pixel is made of, and the one after the last. */
  readonly first: Int32Array
  readonly end: Int32Array
  /** `TAPS` for each pixel, from `first` on; they add up to one. */
  readonly values: Int32Array
}

function weightsFor (from: number, to: number): Weights {
  const weights = { first: new Int32Array(to), end: new Int32Array(to), values: new Int32Array(to * TAPS) }
  for (let i = 0; i < to; i++) {
    const centre = (i + 0.5) * from / to
    const first = weights.first[i] = Math.max(Math.trunc(centre - SUPPORT + 0.5), 0)
    const end = weights.end[i] = Math.min(Math.trunc(centre + SUPPORT + 0.5), from)
    const values = Array.from({ length: end - first }, (_, tap) => cubic(first + tap - centre + 0.5))
    const sum = values.reduce((total, value) => total + value, 0)
    weights.values.set(values.map(value => Math.round(value / sum * 2 ** PLACES)), i * TAPS)
  }
  return weights
}

/** Enlarges the middle one of three dimensions, [outer, from, inner] to [outer, to, inner]. */
function stretch (source: Uint8Array, from: number, to: number, inner: number): Uint8Array {
  if (from === to) return source
  const { first, end, values } = weightsFor(from, to)
  const out = new Uint8ClampedArray(source.length / from * to)
  let into = 0
  for (let line = 0; line < source.length; line += from * inner) {
    for (let i = 0; i < to; i++) {
      const begin = line + (first[i] as number) * inner
      const stop = line + (end[i] as number) * inner
      for (let k = 0; k < inner; k++) {
        let sum = HALF
        for (let at = begin + k, tap = i * TAPS; at < stop; at += inner, tap++) sum += (values[tap] as number) * (source[at] as number)
        out[into++] = sum >> PLACES
      }
    }
  }
  return new Uint8Array(out.buffer)
}

/** `rgb`, a picture of `from`, enlarged to `to`: neither side may be smaller there. */
export function enlarge (rgb: Uint8Array, from: PictureSize, to: PictureSize): Uint8Array {
  return stretch(stretch(rgb, from.width, to.width, 3), from.height, to.height, to.width * 3)
}
