import { findControl } from './control-characters.ts'

/** At most this much of a string is checked in one go, in bytes. */
const SLICE = 1 << 20

/**
 * Skips what is plain in long strings, such as pictures in base64, by memory search: several times faster than looking at
 * each byte.
 */
export class LongStrings {
  readonly #bytes: Buffer
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
    const control = findControl(this.#bytes, pos, stop)
    return control === -1 ? stop : control
  }

  #next (byte: number, from: number): number {
    const at = this.#bytes.indexOf(byte, from)
    return at === -1 ? this.#bytes.length : at
  }
}
