/** From the 256 levels of a colour channel to the numbers a vision graph takes: the part of preprocessing all families share. */
import { toFloat16 } from '../runtime/float16.ts'
import type { TensorData } from '../runtime/types.ts'
import { ModelError, type ModelSource } from './family.ts'
import { finite, flag, perChannel } from './fields.ts'

const PREPROCESSOR = 'preprocessor_config.json'

/** Per channel, the value of each of the 256 levels: `(v * rescale - mean) / std`, in the element type of the graph. */
export interface Normaliser {
  readonly type: 'float32' | 'float16'
  readonly tables: ReadonlyArray<Float32Array | Uint16Array>
}

export type PixelArray = Float32Array<ArrayBuffer> | Uint16Array<ArrayBuffer>

function makeNormaliser (type: 'float32' | 'float16', rescale: number, mean: readonly number[], std: readonly number[]): Normaliser {
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

/** A tensor over all of `pixels`. */
export function pixelTensor (pixels: PixelArray, dims: readonly number[]): TensorData {
  return pixels instanceof Float32Array ? { type: 'float32', dims, data: pixels } : { type: 'float16', dims, data: pixels }
}

type Channels = readonly [number, number, number]

/**
 * The normaliser preprocessor_config.json asks for, in the element type of the vision graph's input `name`; `mean` and
 * `std` are what the family's processor takes when they are not given.
 */
export function readNormaliser ({ preprocessor, vision }: ModelSource, name: string, mean: Channels, std: Channels): Normaliser {
  const type = vision?.inputs.find(input => input.name === name)?.type ?? 'float32'
  if (type !== 'float32' && type !== 'float16') throw new ModelError(`onnx/vision_encoder.onnx takes ${type} pixels; float32 and float16 are supported`)
  const rescale = flag(preprocessor, 'do_rescale', true) ? finite(preprocessor, 'rescale_factor', PREPROCESSOR, 1 / 255) : 1
  const normalised = flag(preprocessor, 'do_normalize', true)
  return makeNormaliser(
    type,
    rescale,
    normalised ? perChannel(preprocessor, 'image_mean', PREPROCESSOR, mean) : [0, 0, 0],
    normalised ? perChannel(preprocessor, 'image_std', PREPROCESSOR, std) : [1, 1, 1]
  )
}
