import type { SampledToken } from '../sequence/sampling.ts'
import type { Outcome, Sequence, SequenceSink } from '../sequence/sequence.ts'
import type { Detokenizer } from '../text/detokenizer.ts'
import type { ToolCall, ToolCallParser } from '../text/tool-calls.ts'
import { StopStrings } from '../text/stop-strings.ts'

/** One step of a choice. `text` is empty while the token's character is incomplete, or may begin a stop string. */
export type ChoiceEvent =
  | { readonly type: 'token', readonly index: number, readonly text: string, readonly token: SampledToken, readonly calls?: readonly ToolCall[] }
  | { readonly type: 'end', readonly index: number, readonly text: string, readonly outcome: Outcome, readonly calls?: readonly ToolCall[] }

export interface ChoiceOptions {
  readonly index: number
  readonly detokenizer: Detokenizer
  readonly stop: readonly string[]
  readonly includeStop: boolean
  /** Finds the calls of tools in the text. */
  readonly calls?: ToolCallParser | undefined
  /** The answer ends with the first call. */
  readonly oneCall?: boolean
  onEvent (event: ChoiceEvent): void
  /** The reader of its events is far behind. */
  isFull (): boolean
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

  get full (): boolean {
    return this.#options.isFull()
  }

  onToken (_sequence: Sequence, token: SampledToken): boolean {
    const text = this.#stops.push(this.#options.detokenizer.push(token.token))
    const { calls: parser, oneCall = false } = this.#options
    const found = parser?.push(text)
    this.#options.onEvent({ type: 'token', index: this.index, token, ...found ?? { text } })
    return this.#stops.found || (oneCall && (parser?.calls ?? 0) > 0)
  }

  onEnd (_sequence: Sequence, outcome: Outcome): void {
    this.outcome = outcome
    const rest = this.#stops.push(this.#options.detokenizer.flush())
    const text = rest + this.#stops.flush()
    const { calls: parser } = this.#options
    const last = parser?.push(text)
    this.#options.onEvent({ type: 'end', index: this.index, outcome, ...last === undefined || parser === undefined ? { text } : { text: last.text + parser.flush(), calls: last.calls } })
  }
}

/** OpenAI's finish reason; undefined when the choice failed or was cancelled. */
export function finishReason (outcome: Outcome): 'stop' | 'length' | undefined {
  return outcome.kind === 'stop' || outcome.kind === 'length' ? outcome.kind : undefined
}

/** From so many unread events on, no more tokens are computed for their reader. */
const MAX_UNREAD = 512

/** Choice events on their way to one reader. */
export class EventQueue {
  readonly #onRead: () => void
  #events: ChoiceEvent[] = []
  #wake: (() => void) | undefined

  /** @param onRead called when a full queue has been read */
  constructor (onRead: () => void) {
    this.#onRead = onRead
  }

  get full (): boolean {
    return this.#events.length >= MAX_UNREAD
  }

  push (event: ChoiceEvent): void {
    this.#events.push(event)
    this.#wake?.()
  }

  /** All events since the last call; waits for at least one. */
  async take (): Promise<ChoiceEvent[]> {
    if (this.#events.length === 0) {
      await new Promise<void>(resolve => { this.#wake = resolve })
      this.#wake = undefined
    }
    const events = this.#events
    this.#events = []
    if (events.length >= MAX_UNREAD) this.#onRead()
    return events
  }
}
