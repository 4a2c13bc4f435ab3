/** Finds stop strings in text that comes in pieces, and holds back what may be the beginning of one. */
export class StopStrings {
  readonly #stops: readonly string[]
  readonly #include: boolean
  /** The longest suffix of the text so far that is a proper prefix of a stop string. */
  #held = ''
  #found = false

  /** `include`: the stop string itself is part of the text. */
  constructor (stops: readonly string[], include: boolean) {
    this.#stops = stops
    this.#include = include
  }

  get found (): boolean {
    return this.#found
  }

  /** Text that can be sent now; empty once a stop string was found. */
  push (piece: string): string {
    if (this.#found) return ''
    if (this.#stops.length === 0) return piece
    const text = this.#held + piece
    let cut = -1
    let stop = ''
    for (const candidate of this.#stops) {
      const at = text.indexOf(candidate)
      if (at >= 0 && (cut < 0 || at < cut)) [cut, stop] = [at, candidate]
    }
    if (cut >= 0) {
      this.#found = true
      this.#held = ''
      return text.slice(0, cut) + (this.#include ? stop : '')
    }
    const keep = this.#heldLength(text)
    this.#held = keep === 0 ? '' : text.slice(-keep)
    return keep === 0 ? text : text.slice(0, -keep)
  }

  /** At the end without a stop string: returns what was held back. */
  flush (): string {
    const held = this.#held
    this.#held = ''
    return held
  }

  #heldLength (text: string): number {
    let longest = 0
    for (const stop of this.#stops) {
      for (let n = Math.min(stop.length - 1, text.length); n > longest; n--) {
        if (text.endsWith(stop.slice(0, n))) {
          longest = n
          break
        }
      }
    }
    return longest
  }
}
