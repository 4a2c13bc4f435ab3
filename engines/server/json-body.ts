import { isAscii } from 'node:buffer'
import { randomUUID } from 'node:crypto'
import { setImmediate as nextTurn } from 'node:timers/promises'
import { EngineError } from '../service/errors.ts'

/** A body below this is parsed at once: whatever is in it, that takes no more than some 20 ms. */
const SMALL_BYTES = 256 << 10
/** Strings from here on are cut out before the rest is parsed: pictures, and texts that may be too long. */
const LONG_STRING_BYTES = 32 << 10
/** The rest: more text than any prompt made of short strings. */
const MAX_REST_BYTES = 8 << 20
/** What parsing costs: an object, a list or a string counts as eight numbers. 2 million take about 60 ms. */
const MAX_WEIGHT = 2_000_000
const HEAVY = 8
/** Steps, and bytes of a long string, between two turns of the event loop. */
const STEPS = 1 << 17
const PIECE_BYTES = 1 << 20
const ESCAPED_RUN = 4096

const [QUOTE, BACKSLASH, COMMA, BRACKET, BRACE, U] = Buffer.from('"\\,[{u') as unknown as [number, number, number, number, number, number]

interface Cut {
  /** The body without its long strings, each replaced by its name. */
  readonly rest: string
  /** Where the long strings lie, without their quotes. */
  readonly strings: ReadonlyMap<string, readonly [start: number, end: number]>
}

/**
 * Parses a JSON body without holding up the event loop: long strings are found and decoded in slices, and a body of more
 * values than a request can need is refused before it is parsed.
 * @param parse for the body without its long strings; throws what is wrong with it
 * @throws EngineError `request_too_large`
 */
export async function parseBody (body: Buffer, parse: (text: string) => unknown): Promise<unknown> {
  if (body.length < SMALL_BYTES) return parse(body.toString())
  const { rest, strings } = await cut(body)
  const value = parse(rest)
  if (strings.size === 0) return value
  const decoded = new Map<string, string>()
  for (const [name, [start, end]] of strings) decoded.set(name, await decode(body.subarray(start, end), parse))
  return restore(value, decoded)
}

async function cut (body: Buffer): Promise<Cut> {
  const key = randomUUID()
  const strings = new Map<string, readonly [number, number]>()
  const pieces: string[] = []
  let [at, from, weight, steps, rest] = [0, 0, 0, 0, 0]
  /** The next of each from `at` on, if not before it; the end of the body where there is none. */
  let [quote, backslash] = [-1, -1]
  const keep = (to: number): void => {
    rest += to - from
    if (rest > MAX_REST_BYTES) throw new EngineError('request_too_large', `The body has more than ${MAX_REST_BYTES >> 20} MiB beside its long strings.`)
    pieces.push(body.toString('utf8', from, to))
  }
  while (at < body.length) {
    const byte = body[at++] as number
    if (byte === QUOTE) {
      const start = at
      for (;;) {
        if (quote < at) quote = position(body, QUOTE, at)
        if (backslash < at) backslash = position(body, BACKSLASH, at)
        if (backslash > quote || quote === body.length) break
        // An escape: byte by byte for a while, because more are likely.
        at = backslash
        for (const until = at + ESCAPED_RUN; at < until && body[at] !== QUOTE; steps++) at += body[at] === BACKSLASH ? 2 : 1
        if (steps >= STEPS) {
          steps = 0
          await nextTurn()
        }
      }
      const end = quote
      at = end + 1
      weight += HEAVY
      if (end - start >= LONG_STRING_BYTES) {
        const name = `${key}:${strings.size}`
        keep(start)
        pieces.push(name)
        strings.set(name, [start, end])
        from = end
      }
    } else if (byte === COMMA) weight++
    else if (byte === BRACKET || byte === BRACE) weight += HEAVY
    if (weight > MAX_WEIGHT) throw new EngineError('request_too_large', 'The body holds more JSON values than a request can need.')
    if (++steps >= STEPS) {
      steps = 0
      await nextTurn()
    }
  }
  keep(body.length)
  return { rest: pieces.join(''), strings }
}

function position (body: Buffer, byte: number, from: number): number {
  const at = body.indexOf(byte, from)
  return at < 0 ? body.length : at
}

/** The text of a long string, given without its quotes. */
async function decode (bytes: Buffer, parse: (text: string) => unknown): Promise<string> {
  await nextTurn()
  if (!bytes.includes(BACKSLASH) && isAscii(bytes)) return bytes.toString('latin1')
  let text = ''
  for (let at = 0; at < bytes.length;) {
    const end = endOfPiece(bytes, at)
    text += parse(`"${bytes.toString('utf8', at, end)}"`) as string
    at = end
    await nextTurn()
  }
  return text
}

/** Where a piece that begins at `at` may end: neither in an escape nor in a character. */
function endOfPiece (bytes: Buffer, at: number): number {
  const wanted = at + PIECE_BYTES
  while (at < wanted && at < bytes.length) at += bytes[at] !== BACKSLASH ? 1 : bytes[at + 1] === U ? 6 : 2
  while (at < bytes.length && ((bytes[at] as number) & 0xc0) === 0x80) at++
  return Math.min(at, bytes.length)
}

/** Puts the long strings in their places. With a list of what is left to do, because a body may be nested deeper than calls may be. */
function restore (value: unknown, strings: ReadonlyMap<string, string>): unknown {
  const root = { value }
  const left: object[] = [root]
  for (let next = left.pop(); next !== undefined; next = left.pop()) {
    const members = next as Record<string, unknown>
    for (const key of Object.keys(members)) {
      const member = members[key]
      if (typeof member === 'string') members[key] = strings.get(member) ?? member
      else if (typeof member === 'object' && member !== null) left.push(member)
    }
  }
  return root.value
}
