import type { Outcome } from '../sequence/sequence.ts'
import type { ToolCall } from '../text/tool-calls.ts'
import type { Tokenizer } from '../text/tokenizer.ts'
import { isObject, type Json } from './fields.ts'
import { finishReason } from './choice.ts'
import type { Usage } from './generation.ts'
import { chatLogprob, CompletionLogprobs, type ChatLogprob } from './logprobs.ts'
import type { SampledToken } from '../sequence/sampling.ts'

/** Members that all objects of one answer have in common. */
export interface AnswerHead {
  readonly id: string
  readonly created: number
  readonly model: string
  readonly system_fingerprint: string
}

/** The JSON of an answer: the APIs differ in nothing else. */
export interface AnswerShape {
  /** First event of a choice, before any text, if the API has one. */
  opening (index: number): string | undefined
  /** An event with text or log probabilities; undefined when there is neither. */
  piece (index: number, text: string, token: SampledToken | undefined, calls?: readonly ToolCall[]): string | undefined
  closing (index: number, outcome: Outcome): string
  /** What ends a stream. */
  end (usage: () => Usage): string
  /** The answer of a request that does not stream. */
  whole (choices: ReadonlyArray<{ text: string, calls: readonly ToolCall[], tokens: readonly SampledToken[], outcome: Outcome }>, usage: Usage): object
}

const DONE = 'data: [DONE]\n\n'

const event = (json: string): string => `data: ${json}\n\n`

const asksForUsage = ({ stream_options: options }: Json): boolean => isObject(options) && options.include_usage === true

/** The constant text around a chunk's choices: the hundreds of chunks of a stream differ in one short member. */
function chunkParts (object: string, head: AnswerHead, withUsage: boolean): { before: string, after: string } {
  const text = JSON.stringify({ id: head.id, object, created: head.created, model: head.model, system_fingerprint: head.system_fingerprint })
  return { before: `${text.slice(0, -1)},"choices":[`, after: withUsage ? '],"usage":null}' : ']}' }
}

const callOf = ({ id, name, arguments: given }: ToolCall): object => ({ id, type: 'function', function: { name, arguments: given } })

/** An answer with calls waits for their results. */
function reasonOf (outcome: Outcome, calls: number): string | undefined {
  const reason = finishReason(outcome)
  return reason === 'stop' && calls > 0 ? 'tool_calls' : reason
}

export function chatShape (head: AnswerHead, tokenizer: Tokenizer, body: Json): AnswerShape {
  const withUsage = asksForUsage(body)
  const { before, after } = chunkParts('chat.completion.chunk', head, withUsage)
  const chunk = (index: number, delta: string, logprobs: string, reason: string): string =>
    event(`${before}{"index":${index},"delta":${delta},"logprobs":${logprobs},"finish_reason":${reason}}${after}`)
  /** Calls so far of each choice of a stream. */
  const called = new Map<number, number>()
  const deltaOf = (index: number, text: string, calls: readonly ToolCall[]): string => {
    const before = called.get(index) ?? 0
    called.set(index, before + calls.length)
    return JSON.stringify({ ...text === '' ? {} : { content: text }, tool_calls: calls.map((call, i) => ({ index: before + i, ...callOf(call) })) })
  }
  const logprobsOf = (content: readonly ChatLogprob[]): object | null => content.length === 0 ? null : { content, refusal: null }
  return {
    opening: index => chunk(index, '{"role":"assistant","content":"","refusal":null}', 'null', 'null'),
    piece (index, text, token, calls = []) {
      const entry = token === undefined ? undefined : chatLogprob(tokenizer, token)
      if (text === '' && entry === undefined && calls.length === 0) return undefined
      return chunk(index, calls.length === 0 ? `{"content":${JSON.stringify(text)}}` : deltaOf(index, text, calls), entry === undefined ? 'null' : JSON.stringify(logprobsOf([entry])), 'null')
    },
    closing: (index, outcome) => chunk(index, '{}', 'null', JSON.stringify(reasonOf(outcome, called.get(index) ?? 0))),
    end: usage => (withUsage ? event(`${before}],"usage":${JSON.stringify(usage())}}`) : '') + DONE,
    whole: (choices, usage) => ({
      id: head.id,
      object: 'chat.completion',
      created: head.created,
      model: head.model,
      choices: choices.map(({ text, calls, tokens, outcome }, index) => ({
        index,
        message: { role: 'assistant', content: text === '' && calls.length > 0 ? null : text, refusal: null, ...calls.length > 0 ? { tool_calls: calls.map(callOf) } : {} },
        logprobs: logprobsOf(tokens.map(token => chatLogprob(tokenizer, token)).filter(entry => entry !== undefined)),
        finish_reason: reasonOf(outcome, calls.length)
      })),
      usage,
      system_fingerprint: head.system_fingerprint
    })
  }
}

export function completionShape (head: AnswerHead, tokenizer: Tokenizer, body: Json): AnswerShape {
  const withUsage = asksForUsage(body)
  const { before, after } = chunkParts('text_completion', head, withUsage)
  /** Where the next token of a choice begins: the text of the tokens before it, sent yet or held back. */
  const offsets = new Map<number, number>()
  const logprobsOf = (index: number, tokens: readonly SampledToken[]): CompletionLogprobs | null => {
    if (tokens[0]?.logprob === undefined) return null
    const logprobs = new CompletionLogprobs()
    for (const token of tokens) {
      const offset = offsets.get(index) ?? 0
      logprobs.add(tokenizer, token, offset)
      offsets.set(index, offset + (logprobs.tokens.at(-1)?.length ?? 0))
    }
    return logprobs
  }
  const chunk = (index: number, text: string, logprobs: object | null, reason: string): string =>
    event(`${before}{"index":${index},"text":${JSON.stringify(text)},"logprobs":${JSON.stringify(logprobs)},"finish_reason":${reason}}${after}`)
  return {
    opening: () => undefined,
    piece (index, text, token) {
      const logprobs = token === undefined ? null : logprobsOf(index, [token])
      return text === '' && logprobs === null ? undefined : chunk(index, text, logprobs, 'null')
    },
    closing: (index, outcome) => chunk(index, '', null, JSON.stringify(finishReason(outcome))),
    end: usage => (withUsage ? event(`${before}],"usage":${JSON.stringify(usage())}}`) : '') + DONE,
    whole: (choices, usage) => ({
      id: head.id,
      object: 'text_completion',
      created: head.created,
      model: head.model,
      choices: choices.map(({ text, tokens, outcome }, index) => ({ index, text, logprobs: logprobsOf(index, tokens), finish_reason: finishReason(outcome) })),
      usage,
      system_fingerprint: head.system_fingerprint
    })
  }
}
