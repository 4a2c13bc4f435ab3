import type { Detokenizer } from '../text/detokenizer.ts'
import type { Outcome, Sequence, SequenceSink } from '../sequence/sequence.ts'
import { StopStrings } from '../text/stop-strings.ts'
import type { SampledToken } from '../sequence/sampling.ts'

/** What happened to one choice. `text` may be empty when the token's character is not complete yet. */
export type ChoiceEvent =
  | { readonly type: 'token', readonly index: number, readonly text: string, readonly token: SampledToken }
  | { readonly type: 'end', readonly index: number, readonly text: string, readonly outcome: Outcome }

export interface ChoiceOptions {
  readonly index: number
  readonly detokenizer: Detokenizer
  readonly stop: readonly string[]
  readonly includeStop: boolean
  onEvent (event: ChoiceEvent): void
}

/** One of the `n` answers: tokens in, text out. */
export class Choice implements SequenceSink {
  readonly index: number
  readonly #options: ChoiceOptions
  readonly #stops: StopStrings
  sequence: Sequence | undefined
  outcome: Outcome | undefined

  constructor (options: ChoiceOptions) {
    this.index = options.index
    this.#options = options
    this.#stops = new StopStrings(options.stop, options.includeStop)
  }

  onToken (_sequence: Sequence, token: SampledToken): boolean {
    const text = this.#stops.push(this.#options.detokenizer.push(token.token))
    this.#options.onEvent({ type: 'token', index: this.index, text, token })
    return this.#stops.found
  }

  onEnd (_sequence: Sequence, outcome: Outcome): void {
    this.outcome = outcome
    const rest = this.#stops.push(this.#options.detokenizer.flush())
    this.#options.onEvent({ type: 'end', index: this.index, text: rest + this.#stops.flush(), outcome })
  }
}

/** OpenAI's finish reason; undefined when the choice failed or was cancelled. */
export function finishReason (outcome: Outcome): 'stop' | 'length' | undefined {
  return outcome.kind === 'stop' || outcome.kind === 'length' ? outcome.kind : undefined
}
