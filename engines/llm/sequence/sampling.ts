/** How the next token is chosen. Structured-clonable: it travels to the session worker. */
export interface SamplingParams {
  /** 0: greedy. */
  readonly temperature: number
  /** 1: off. */
  readonly topP: number
  /** 0: off. */
  readonly topK: number
  /** 0: off. */
  readonly minP: number
  /** Unsigned 32 bit. Draw `i` of a sequence depends on seed and `i` alone, never on what it was batched with. */
  readonly seed: number
  /** 1: off. Over prompt and output, as in CTRL. */
  readonly repetitionPenalty: number
  /** 0: off. Over output, as OpenAI defines them. */
  readonly presencePenalty: number
  readonly frequencyPenalty: number
  readonly logitBias: ReadonlyArray<readonly [token: number, bias: number]>
  /** No end-of-sequence or stop id before so many tokens. */
  readonly minTokens: number
  readonly ignoreEos: boolean
  /** The model's end-of-sequence ids. */
  readonly eosIds: readonly number[]
  /** The request's own. */
  readonly stopIds: readonly number[]
  /** undefined: no log probabilities; else how many alternatives besides the chosen token. */
  readonly topLogprobs: number | undefined
}

export const GREEDY: SamplingParams = {
  temperature: 0,
  topP: 1,
  topK: 0,
  minP: 0,
  seed: 0,
  repetitionPenalty: 1,
  presencePenalty: 0,
  frequencyPenalty: 0,
  logitBias: [],
  minTokens: 0,
  ignoreEos: false,
  eosIds: [],
  stopIds: [],
  topLogprobs: undefined
}

export interface SampledToken {
  readonly token: number
  /** Natural logarithm of the model's own probability, before temperature and penalties; with `topLogprobs` only. */
  readonly logprob?: number
  /** The most likely tokens, best first. */
  readonly top?: ReadonlyArray<{ readonly token: number, readonly logprob: number }>
}
