import { isUtf8 } from 'node:buffer'
import { epdError } from '../errors.ts'
import type { Pace } from './pace.ts'

/** Bytes checked between two looks at the clock: about 1 ms. */
export const UTF8_STEP = 4 << 20

/** Checks a large body step by step, and says where a body is not UTF-8. @throws EPD_ERR_INVALID_UTF8 with the byte offset */
export async function checkUtf8 (bytes: Buffer, pace: Pace): Promise<void> {
  let start = 0
  while (start < bytes.length) {
    let end = Math.min(bytes.length, start + UTF8_STEP)
    // A step ends before the character that its boundary would cut.
    if (end < bytes.length) end = characterStart(bytes, end)
    if (!isUtf8(bytes.subarray(start, end))) throw epdError('EPD_ERR_INVALID_UTF8', [firstInvalid(bytes, start, end)])
    start = end
    if (pace.due()) await pace.rest()
  }
}

/** Offset of the first byte of the character at `offset`. */
function characterStart (bytes: Buffer, offset: number): number {
  let at = offset
  for (let n = 0; n < 3 && (bytes[at]! & 0xc0) === 0x80; n++) at--
  return at
}

/** Offset of the first byte that is not part of a character: by halving, then character by character. */
function firstInvalid (bytes: Buffer, start: number, end: number): number {
  let low = start
  let high = end
  while (high - low > 4) {
    const middle = characterStart(bytes, (low + high) >> 1)
    if (middle <= low) break
    if (isUtf8(bytes.subarray(low, middle))) low = middle
    else high = middle
  }
  while (low < high) {
    const width = characterWidth(bytes[low]!)
    if (width === 0 || !isUtf8(bytes.subarray(low, low + width))) break
    low += width
  }
  return low
}

function characterWidth (lead: number): number {
  if (lead < 0x80) return 1
  if (lead >= 0xc2 && lead < 0xe0) return 2
  if (lead >= 0xe0 && lead < 0xf0) return 3
  return lead >= 0xf0 && lead < 0xf5 ? 4 : 0
}
