import type { SampledToken } from './sampler.ts'
import type { Outcome, Sequence } from './sequence.ts'

/** Whether the token just sampled ends the sequence. A token that ends it by id is not shown to the sink: it is no text. */
export function stopOutcome (sequence: Sequence, sampled: SampledToken, maxLength: number): Extract<Outcome, { kind: 'stop' | 'length' }> | undefined {
  const { ignoreEos, eosIds, stopIds } = sequence.sampling
  if (!ignoreEos && eosIds.includes(sampled.token)) return { kind: 'stop', reason: 'eos' }
  if (stopIds.includes(sampled.token)) return { kind: 'stop', reason: 'stop_id' }
  if (sequence.sink.onToken(sequence, sampled)) return { kind: 'stop', reason: 'stop_string' }
  if (sequence.generated >= sequence.maxTokens || sequence.length >= maxLength) return { kind: 'length' }
  return undefined
}

/**
 * Finds stop strings in text that comes in pieces, and keeps back what may turn out to be the beginning of one.
 */
export class StopStrings {
  readonly #stops: readonly string[]
  readonly #include: boolean
  /** Text held back: a suffix of what came that is a proper prefix of some stop string. */
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

  /** Text that may be shown now. After a stop string was found, nothing more comes. */
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

  /** The end came without a stop string: what was held back is text. */
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
