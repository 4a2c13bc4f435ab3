/** Pictures for tests against vLLM: PNGs of a few hundred bytes, the same on every machine, all different by seed. */
import { deflateSync } from 'node:zlib'
import { pngHeader } from '../helper/png.ts'
import { mulberry32 } from '../helper/random.ts'

/** Side of the squares of one colour, so that zlib leaves little of them. */
const SQUARE = 28

/** @param level - of compression; 0 gives the size of a photograph */
export function picture (seed: number, width: number, height = width, level = 6): Buffer {
  const next = mulberry32(seed * 7919 + width * 31 + height)
  const rows: Buffer[] = []
  for (let y = 0; y < height; y++) {
    if (y % SQUARE !== 0) { rows.push(rows.at(-1)!); continue }
    const row = Buffer.alloc(1 + width * 3)
    for (let x = 0; x < width; x += SQUARE) {
      const colour = next()
      for (let i = x; i < Math.min(x + SQUARE, width); i++) row.writeUIntBE(colour & 0xffffff, 1 + i * 3, 3)
    }
    rows.push(row)
  }
  return pngHeader(width, height, deflateSync(Buffer.concat(rows), { level }))
}

export function dataUrl (png: Buffer): string {
  return `data:image/png;base64,${png.toString('base64')}`
}

export interface Part { readonly type: string, readonly [key: string]: unknown }

export function imagePart (url: string | null, uuid?: string): Part {
  return { type: 'image_url', image_url: url === null ? null : { url }, ...(uuid === undefined ? {} : { uuid }) }
}

export function textPart (text: string): Part {
  return { type: 'text', text }
}

/** A picture that E has encoded, as PD takes it: a grid in place of pixels. */
export function embedsPart (uuid: string | undefined, grid: readonly number[]): Part {
  return { type: 'image_embeds', image_embeds: { image_grid_thw: grid }, ...(uuid === undefined ? {} : { uuid }) }
}

export function chat (parts: readonly Part[], more: object = {}): object {
  return { model: 'tiny', messages: [{ role: 'user', content: parts }], ...more }
}
