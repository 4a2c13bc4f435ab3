import { isUtf8 } from 'node:buffer'
import type { MediaItem } from '../../adapters/adapter.ts'
import { ScannedBody } from './body.ts'
import type { Body } from './body.ts'
import { Collector } from './collector.ts'
import { epdError } from '../errors.ts'
import { JsonScanner } from './json-scanner.ts'
import { describeMedia, estimateTokens } from './media.ts'
import type { TokenEstimator } from './media.ts'
import { Pace } from './pace.ts'

/** Bytes scanned between two looks at the clock. */
const SCAN_STEP = 128 * 1024
/** Bytes checked for UTF-8 between two looks at the clock. */
const UTF8_STEP = 4 << 20

const NO_MEDIA: readonly MediaItem[] = []

export const DEFAULT_MAX_DEPTH = 256
export const DEFAULT_MAX_MEDIA = 512

export interface ParseOptions {
  /** @default {@link estimateTokens} */
  readonly estimateTokens?: TokenEstimator | undefined
  /** Deepest nesting taken. @default 256 */
  readonly maxDepth?: number | undefined
  /** Most media parts in one request. @default 512 */
  readonly maxMedia?: number | undefined
  /** Refuse a body without `model`; otherwise its model is ''. @default true */
  readonly requireModel?: boolean | undefined
}

/**
 * Looks through a request body once, as bytes: checks that it is JSON in UTF-8, notes its top-level members and its
 * media parts, takes out control fields. Gives way to other requests every few milliseconds. The bytes must not change
 * afterwards.
 *
 * @throws EPD_ERR_INVALID_JSON and EPD_ERR_INVALID_UTF8 with the byte offset; EPD_ERR_DUPLICATE_MEMBER,
 * EPD_ERR_MISSING_VALUE, EPD_ERR_INVALID_VALUE, EPD_ERR_INVALID_MEDIA, EPD_ERR_TOO_MANY_MEDIA with the member or part as `param`.
 */
export async function parseBody (bytes: Buffer, options: ParseOptions = {}): Promise<Body> {
  refuseMark(bytes)
  const pace = new Pace()
  if (bytes.length <= UTF8_STEP) checkPart(bytes, 0, bytes.length)
  else await checkUtf8(bytes, pace)
  const collector = new Collector(bytes, options.maxMedia ?? DEFAULT_MAX_MEDIA)
  const scanner = new JsonScanner(bytes, collector, options.maxDepth ?? DEFAULT_MAX_DEPTH)
  collector.scanner = scanner
  for (;;) {
    scanner.run(scanner.position + SCAN_STEP)
    if (scanner.position >= bytes.length) break
    if (pace.due()) await pace.rest()
  }
  scanner.finish()
  const media = collector.media.length === 0 ? NO_MEDIA : await describeMedia(bytes, collector.media, options.estimateTokens ?? estimateTokens, pace)
  return new ScannedBody(bytes, collector, media, options.requireModel ?? true)
}

/** The same for a value a gateway made itself; strings and Buffers are taken as JSON text. */
export async function parseBodyValue (value: unknown, options: ParseOptions = {}): Promise<Body> {
  if (Buffer.isBuffer(value)) return await parseBody(value, options)
  const text = typeof value === 'string' ? value : JSON.stringify(value)
  if (text === undefined) throw epdError('EPD_ERR_INVALID_JSON', ['The request body must be a JSON object'])
  return await parseBody(Buffer.from(text), options)
}

function refuseMark (bytes: Buffer): void {
  if (bytes[0] === 0xef && bytes[1] === 0xbb && bytes[2] === 0xbf) {
    throw epdError('EPD_ERR_INVALID_JSON', ['The request body is not valid JSON: a byte order mark at byte 0'])
  }
}

async function checkUtf8 (bytes: Buffer, pace: Pace): Promise<void> {
  let pos = 0
  while (pos < bytes.length) {
    let stop = Math.min(bytes.length, pos + UTF8_STEP)
    // Not in the middle of a character: go back over at most three continuation bytes.
    if (stop < bytes.length) for (let n = 0; n < 3 && (bytes[stop]! & 0xc0) === 0x80; n++) stop--
    checkPart(bytes, pos, stop)
    pos = stop
    if (pos < bytes.length && pace.due()) await pace.rest()
  }
}

function checkPart (bytes: Buffer, from: number, to: number): void {
  if (isUtf8(to - from === bytes.length ? bytes : bytes.subarray(from, to))) return
  const offset = firstInvalid(bytes, from, to)
  throw epdError('EPD_ERR_INVALID_UTF8', [offset])
}

/** Offset of the first byte that is not part of a character, by halving. */
function firstInvalid (bytes: Buffer, from: number, to: number): number {
  let low = from
  let high = to
  while (high - low > 4) {
    let middle = (low + high) >> 1
    for (let n = 0; n < 3 && (bytes[middle]! & 0xc0) === 0x80; n++) middle--
    if (middle <= low) break
    if (isUtf8(bytes.subarray(low, middle))) low = middle
    else high = middle
  }
  for (; low < high; low++) {
    const width = charWidth(bytes[low]!)
    if (width === 0 || !isUtf8(bytes.subarray(low, low + width))) break
    low += width - 1
  }
  return low
}

function charWidth (lead: number): number {
  if (lead < 0x80) return 1
  if (lead >= 0xc2 && lead < 0xe0) return 2
  if (lead >= 0xe0 && lead < 0xf0) return 3
  return lead >= 0xf0 && lead < 0xf5 ? 4 : 0
}
