/** The JSON of answers to /v1/responses. */
import type { SampledToken } from '../sequence/sampling.ts'
import type { Outcome } from '../sequence/sequence.ts'
import type { Tokenizer } from '../text/tokenizer.ts'
import type { Json } from './fields.ts'
import type { Usage } from './generation.ts'
import { chatLogprob, type ChatLogprob } from './logprobs.ts'
import type { AnswerHead, AnswerShape } from './shape.ts'

/** Members of the request that its answer repeats. */
const REPEATED = { instructions: null, max_output_tokens: null, metadata: {}, temperature: null, top_p: null, text: { format: { type: 'text' } }, user: null }

export function responseShape (head: AnswerHead, tokenizer: Tokenizer, request: Json): AnswerShape {
  const itemId = `msg_${head.id.slice(head.id.indexOf('_') + 1)}`
  const place = { item_id: itemId, output_index: 0, content_index: 0 }
  let sequenceNumber = 0
  const event = (type: string, members: object): string => `event: ${type}\ndata: ${JSON.stringify({ type, sequence_number: sequenceNumber++, ...members })}\n\n`
  const repeated = Object.fromEntries(Object.entries(REPEATED).map(([key, fallback]) => [key, request[key] ?? fallback]))
  const response = (status: string, output: readonly object[], usage: Usage | null): object => ({
    id: head.id,
    object: 'response',
    created_at: head.created,
    status,
    background: false,
    error: null,
    incomplete_details: status === 'incomplete' ? { reason: 'max_output_tokens' } : null,
    model: head.model,
    output,
    parallel_tool_calls: true,
    previous_response_id: null,
    reasoning: { effort: null, summary: null },
    store: false,
    tool_choice: 'auto',
    tools: [],
    truncation: 'disabled',
    usage: usage === null ? null : usageOf(usage),
    ...repeated
  })
  const part = (text: string, logprobs: readonly ChatLogprob[]): object => ({ type: 'output_text', text, annotations: [], logprobs })
  const item = (status: string, content: readonly object[]): object => ({ id: itemId, type: 'message', status, role: 'assistant', content })
  const statusOf = (outcome: Outcome): string => outcome.kind === 'length' ? 'incomplete' : 'completed'
  const logprobsOf = (tokens: readonly SampledToken[]): ChatLogprob[] => tokens.map(token => chatLogprob(tokenizer, token)).filter(entry => entry !== undefined)

  // What a stream repeats at its end.
  let text = ''
  const logprobs: ChatLogprob[] = []
  let status = 'completed'
  return {
    opening: () => event('response.created', { response: response('in_progress', [], null) }) +
      event('response.in_progress', { response: response('in_progress', [], null) }) +
      event('response.output_item.added', { output_index: 0, item: item('in_progress', []) }) +
      event('response.content_part.added', { ...place, part: part('', []) }),
    piece (_index, delta, token) {
      const added = token === undefined ? [] : logprobsOf([token])
      if (delta === '' && added.length === 0) return undefined
      text += delta
      logprobs.push(...added)
      return event('response.output_text.delta', { ...place, delta, logprobs: added })
    },
    closing (_index, outcome) {
      status = statusOf(outcome)
      return event('response.output_text.done', { ...place, text, logprobs }) +
        event('response.content_part.done', { ...place, part: part(text, logprobs) }) +
        event('response.output_item.done', { output_index: 0, item: item(status, [part(text, logprobs)]) })
    },
    end: usage => event(`response.${status}`, { response: response(status, [item(status, [part(text, logprobs)])], usage()) }),
    whole ([choice], usage) {
      if (choice === undefined) throw new Error('a response has one choice')
      const status = statusOf(choice.outcome)
      return response(status, [item(status, [part(choice.text, logprobsOf(choice.tokens))])], usage)
    }
  }
}

function usageOf (usage: Usage): object {
  return {
    input_tokens: usage.prompt_tokens,
    input_tokens_details: { cached_tokens: usage.prompt_tokens_details.cached_tokens },
    output_tokens: usage.completion_tokens,
    output_tokens_details: { reasoning_tokens: 0 },
    total_tokens: usage.total_tokens
  }
}
