/** At most this much of a string is checked in one go, in bytes. */
const SLICE = 1 << 20

/**
 * Skips what is plain in long strings, such as pictures in base64, by memory search: several times faster than looking at
 * each byte. What JSON forbids in strings, bytes below 0x20, is searched for four at a time.
 */
export class LongStrings {
  readonly #bytes: Buffer
  #words: Int32Array | undefined
  // Next quote and backslash, as far as they have been looked up: both searches go over each byte of the body once at most.
  #quote = -1
  #backslash = -1

  constructor (bytes: Buffer) {
    this.#bytes = bytes
  }

  /** Offset of the next quote, backslash or control character from `pos` on; of a byte before it when that is far; the length at the end. */
  skip (pos: number): number {
    if (this.#quote < pos) this.#quote = this.#next(0x22, pos)
    if (this.#backslash < pos) this.#backslash = this.#next(0x5c, pos)
    const stop = Math.min(this.#quote, this.#backslash, pos + SLICE)
    const control = this.#findControl(pos, stop)
    return control === -1 ? stop : control
  }

  #next (byte: number, from: number): number {
    const at = this.#bytes.indexOf(byte, from)
    return at === -1 ? this.#bytes.length : at
  }

  /** Offset of the first control character in `[from, to)`, or -1. */
  #findControl (from: number, to: number): number {
    const base = this.#bytes.byteOffset
    const firstWord = (base + from + 3) >> 2
    const lastWord = (base + to) >> 2
    if (lastWord - firstWord < 8) return this.#findSlowly(from, to)
    const head = this.#findSlowly(from, firstWord * 4 - base)
    if (head !== -1) return head
    const { buffer } = this.#bytes
    this.#words ??= new Int32Array(buffer, 0, buffer.byteLength >> 2)
    if (anyBelowSpace(this.#words, firstWord, lastWord)) return this.#findSlowly(firstWord * 4 - base, to)
    return this.#findSlowly(lastWord * 4 - base, to)
  }

  #findSlowly (from: number, to: number): number {
    const bytes = this.#bytes
    for (let i = from; i < to; i++) if (bytes[i]! < 0x20) return i
    return -1
  }
}

/** Is any byte of these words below 0x20? "Bit Twiddling Hacks", hasless(x, n); exact for the question "any". */
function anyBelowSpace (words: Int32Array, from: number, to: number): boolean {
  let found = 0
  let i = from
  for (const stop = to - 8; i <= stop; i += 8) {
    const a = words[i]!
    const b = words[i + 1]!
    const c = words[i + 2]!
    const d = words[i + 3]!
    const e = words[i + 4]!
    const f = words[i + 5]!
    const g = words[i + 6]!
    const h = words[i + 7]!
    found |= ((a - 0x20202020) & ~a) | ((b - 0x20202020) & ~b) | ((c - 0x20202020) & ~c) | ((d - 0x20202020) & ~d) |
      ((e - 0x20202020) & ~e) | ((f - 0x20202020) & ~f) | ((g - 0x20202020) & ~g) | ((h - 0x20202020) & ~h)
  }
  for (; i < to; i++) found |= (words[i]! - 0x20202020) & ~words[i]!
  return (found & 0x80808080) !== 0
}
