/** Requests of /v1/responses: other names for what chats have. */
import type { TemplateMessage } from '../text/chat-template.ts'
import { EngineError } from '../../service/errors.ts'
import { isEmpty, isObject, readObject, refuse, unsupported, type Json } from './fields.ts'
import { readMessage } from './input.ts'

/** What members of a chat are called here. */
const NAMES = [['max_completion_tokens', 'max_output_tokens'], ['response_format.json_schema', 'text.format'], ['response_format', 'text.format']] as const

/** Each would need answers that are kept here. */
const STATEFUL = ['previous_response_id', 'conversation', 'background', 'prompt'] as const

/** The request as a chat writes it, but for its input, which stays a list of that name. @throws EngineError naming the field */
export function asChat (body: Json): Json {
  for (const key of STATEFUL) if (!isEmpty(body[key])) unsupported(key, `"${key}" is not supported by this engine, which keeps no responses`)
  if (!isEmpty(body.tools)) unsupported('tools', 'tools are supported in /v1/chat/completions only')
  if ((body.n ?? 1) !== 1) refuse('n', '"n" must be 1 in /v1/responses')
  const { input, max_output_tokens: maxTokens, text, include, messages: _, stream_options: __, ...rest } = body
  if (typeof input !== 'string' && !Array.isArray(input)) refuse('input', '"input" must be a text or a list of items')
  const { format } = isEmpty(text) ? {} as Json : readObject(text, 'text')
  const logprobs = Array.isArray(include) && include.includes('message.output_text.logprobs')
  return {
    ...rest,
    input: typeof input === 'string' ? [{ role: 'user', content: input }] : input,
    max_completion_tokens: maxTokens,
    logprobs,
    ...logprobs ? {} : { top_logprobs: undefined },
    // A schema stands beside its type, where a chat has an object of its own for it.
    response_format: isObject(format) && format.type === 'json_schema' ? { type: 'json_schema', json_schema: format } : format
  }
}

/** An error as the client knows the member it names. */
export function inItsWords (err: unknown): unknown {
  if (!EngineError.is(err)) return err
  const reworded = (text: string): string => NAMES.reduce((result, [name, ours]) => result.replaceAll(name, ours), text)
  const { code, message, param } = err
  return new EngineError(code, reworded(message), { param: param === undefined ? undefined : reworded(param), cause: err })
}

/** The messages of `instructions` and `input`. Call `collectMedia` first: it checks the media parts. */
export function readInput ({ input, instructions }: Json): TemplateMessage[] {
  if (!Array.isArray(input) || input.length === 0) refuse('input', '"input" must not be empty')
  if (!isEmpty(instructions) && typeof instructions !== 'string') refuse('instructions', '"instructions" must be a text')
  const messages = (input as unknown[]).map((item, i) => {
    const param = `input[${i}]`
    if (!isObject(item)) refuse(param, 'an item must be an object')
    const { type = 'message' } = item
    if (type !== 'message') unsupported(`${param}.type`, `items of type ${JSON.stringify(type)?.slice(0, 60)} are not supported by this engine`)
    return readMessage(item, param)
  })
  return typeof instructions === 'string' ? [{ role: 'system', content: instructions }, ...messages] : messages
}
