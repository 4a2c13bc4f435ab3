/** The input of a request: messages of /v1/chat/completions, prompts of /v1/completions. */
import { textOf } from '../../../adapters/wire/json.ts'
import { mediaType, TEXT_PARTS } from '../../../adapters/wire/media.ts'
import type { TemplateMessage } from '../text/chat-template.ts'
import { isEmpty, isObject, readObject, refuse, unsupported, type Json } from './fields.ts'
import { checkSize } from './tools.ts'

const ROLES = new Set(['system', 'developer', 'user', 'assistant', 'tool'])
const MAX_PROMPTS = 128
const MAX_CALLS = 1_024
const MAX_ARGUMENTS = 1 << 18

/** The messages as the chat template takes them. Call `collectMedia` first: it checks the media parts. */
export function readMessages (body: Json): TemplateMessage[] {
  const { messages } = body
  if (!Array.isArray(messages) || messages.length === 0) refuse('messages', '"messages" must be a non-empty list')
  const room = { calls: MAX_CALLS, characters: MAX_ARGUMENTS }
  return (messages as unknown[]).map((message, i) => {
    const param = `messages[${i}]`
    if (!isObject(message)) refuse(param, 'a message must be an object')
    return readMessage(message, param, room)
  })
}

/** What is left for calls of tools in the messages of a request: their arguments are parsed here, on the main thread. */
interface Room {
  calls: number
  characters: number
}

/** `param`: its place in the body. */
export function readMessage (message: Json, param: string, room?: Room): TemplateMessage {
  const { role, content } = message
  if (role === 'function') unsupported(`${param}.role`, 'messages of functions are not supported by this engine: tools have the role "tool"')
  if (typeof role !== 'string' || !ROLES.has(role)) refuse(`${param}.role`, '"role" must be system, developer, user, assistant or tool')
  const head = { role: role === 'developer' ? 'system' : role, ...role === 'tool' ? { tool_call_id: textOf(message.tool_call_id) ?? '' } : {}, ...callsOf(message, `${param}.tool_calls`, room) }
  if (typeof content === 'string') return { ...head, content }
  if (content === undefined || content === null || (Array.isArray(content) && content.length === 0)) return { ...head, content: '' }
  if (!Array.isArray(content)) refuse(`${param}.content`, '"content" must be a string or a list of parts')
  return { ...head, content: (content as unknown[]).map((part, i) => readPart(part, `${param}.content[${i}]`)) }
}

/** The calls of an assistant, their arguments parsed: templates print them as JSON of their own. */
function callsOf ({ role, tool_calls: calls }: Json, param: string, room: Room = { calls: 0, characters: 0 }): Pick<TemplateMessage, 'tool_calls'> {
  if (isEmpty(calls)) return {}
  if (role !== 'assistant' || !Array.isArray(calls)) refuse(param, '"tool_calls" must be a list, in a message of the assistant')
  room.calls -= calls.length
  if (room.calls < 0) refuse(param, `the messages of a request may hold ${MAX_CALLS} calls`)
  return {
    tool_calls: (calls as unknown[]).map((call, i) => {
      const at = `${param}[${i}]`
      const { id, function: called } = readObject(call, at)
      const { name, arguments: given = '{}' } = readObject(called, `${at}.function`)
      if (typeof name !== 'string') refuse(`${at}.function.name`, '"name" must be a string')
      if (typeof given !== 'string') refuse(`${at}.function.arguments`, '"arguments" must be a string')
      room.characters -= given.length
      if (room.characters < 0) refuse(`${at}.function.arguments`, `the arguments of all calls may have ${MAX_ARGUMENTS} characters`)
      const parsed = parseObject(given) ?? refuse(`${at}.function.arguments`, '"arguments" must be a JSON object')
      checkSize(parsed, `${at}.function.arguments`)
      return { type: 'function', id: textOf(id) ?? '', function: { name, arguments: parsed } }
    })
  }
}

function parseObject (text: string): Json | undefined {
  try {
    const value: unknown = JSON.parse(text)
    return isObject(value) ? value : undefined
  } catch {
    return undefined
  }
}

/** `collectMedia` has read media, and refused what is unknown. */
function readPart (part: unknown, param: string): { type: 'text', text: string } | { type: 'image' } {
  if (typeof part === 'string') return { type: 'text', text: part }
  if (!isObject(part)) refuse(param, 'a content part must be a string or an object')
  if (mediaType(part) !== undefined) return { type: 'image' }
  const type = textOf(part.type) ?? ''
  const member = TEXT_PARTS.get(type) ?? unsupported(param, `content parts of type "${type.slice(0, 60)}" are not supported by this engine`)
  const text = part[member]
  if (typeof text !== 'string') refuse(`${param}.${member}`, `"${member}" must be a string`)
  return { type: 'text', text }
}

/** How many prompts a request has, before any of them is read. @throws EngineError `invalid_request` */
export function countPrompts ({ prompt }: Json): number {
  const count = Array.isArray(prompt) && typeof prompt[0] !== 'number' ? prompt.length : 1
  if (count < 1 || count > MAX_PROMPTS) refuse('prompt', `"prompt" must hold 1 to ${MAX_PROMPTS} prompts`)
  return count
}

/**
 * The prompts of /v1/completions: a text, token ids, or a list of either.
 * @throws EngineError `invalid_request`
 */
export function readPrompts (body: Json, vocab: number): Array<string | number[]> {
  const { prompt } = body
  const list: unknown[] = Array.isArray(prompt) && typeof prompt[0] !== 'number' ? prompt : [prompt]
  return list.map((one, i) => {
    const param = list.length === 1 ? 'prompt' : `prompt[${i}]`
    if (typeof one === 'string' && one !== '') return one
    if (isIds(one, vocab)) return one
    return refuse(param, `"${param}" must be a non-empty text or a list of token ids below ${vocab}`)
  })
}

function isIds (value: unknown, vocab: number): value is number[] {
  return Array.isArray(value) && value.length > 0 && value.every(id => Number.isSafeInteger(id) && (id as number) >= 0 && (id as number) < vocab)
}
