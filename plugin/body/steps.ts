import { isUtf8 } from 'node:buffer'
import { epdError } from '../errors.ts'
import type { JsonScanner } from './json-scanner.ts'
import { Pace } from './pace.ts'

/** Bytes checked between two looks at the clock: about 1 ms. */
const UTF8_STEP = 4 << 20
/** The same for scanning: prompts of many small tokens take longest. */
const SCAN_STEP = 128 * 1024

/** Reads a large body step by step, giving way to other requests, and says where a body is not UTF-8. @throws EPD_ERR_INVALID_UTF8 with the byte offset */
export async function scanInSteps (bytes: Buffer, scanner: JsonScanner): Promise<void> {
  const pace = new Pace()
  await checkUtf8(bytes, pace)
  while (!scanner.run(scanner.position + SCAN_STEP)) if (pace.due()) await pace.rest()
}

async function checkUtf8 (bytes: Buffer, pace: Pace): Promise<void> {
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
