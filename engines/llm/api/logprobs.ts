import type { Tokenizer } from '../text/tokenizer.ts'
import type { SampledToken } from '../sequence/sampling.ts'

interface TokenLogprob {
  readonly token: string
  readonly logprob: number
  /** The token's bytes: a token may be half a character, which no string can show. */
  readonly bytes: readonly number[]
}

export interface ChatLogprob extends TokenLogprob {
  readonly top_logprobs: readonly TokenLogprob[]
}

/** JSON has no -Infinity; OpenAI writes -9999 for what can't happen. */
export function finite (logprob: number): number {
  return Number.isFinite(logprob) ? logprob : -9999
}

function describe (tokenizer: Tokenizer, token: number, logprob: number): TokenLogprob {
  const bytes = tokenizer.bytes(token)
  return { token: Buffer.from(bytes).toString('utf8'), logprob: finite(logprob), bytes: [...bytes] }
}

/** One entry of `choices[].logprobs.content`; undefined when log probabilities were not asked for. */
export function chatLogprob (tokenizer: Tokenizer, { token, logprob, top }: SampledToken): ChatLogprob | undefined {
  if (logprob === undefined) return undefined
  return { ...describe(tokenizer, token, logprob), top_logprobs: (top ?? []).map(t => describe(tokenizer, t.token, t.logprob)) }
}

/** The older shape of /v1/completions: parallel lists. */
export class CompletionLogprobs {
  readonly tokens: string[] = []
  readonly token_logprobs: number[] = []
  readonly top_logprobs: Array<Record<string, number>> = []
  readonly text_offset: number[] = []

  add (tokenizer: Tokenizer, sampled: SampledToken, offset: number): void {
    const entry = chatLogprob(tokenizer, sampled)
    if (entry === undefined) return
    this.tokens.push(entry.token)
    this.token_logprobs.push(entry.logprob)
    // The sampled token is always among them: one more than asked for when it is none of the likeliest.
    this.top_logprobs.push(Object.fromEntries([...entry.top_logprobs, entry].map(t => [t.token, t.logprob])))
    this.text_offset.push(offset)
  }
}
