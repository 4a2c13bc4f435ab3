import { EngineError } from '../../service/errors.ts'
import type { TemplateMessage } from '../text/chat-template.ts'
import { isObject, refuse, type Body } from './fields.ts'

const ROLES: Readonly<Record<string, string>> = { system: 'system', developer: 'system', user: 'user', assistant: 'assistant' }

function readPart (part: unknown, param: string): { type: 'text', text: string } | { type: 'image' } {
  if (!isObject(part)) refuse(param, 'a content part must be an object')
  // Everything else was read, or refused, by collectMedia before.
  if (part.type !== 'text') return { type: 'image' }
  if (typeof part.text !== 'string') refuse(`${param}.text`, '"text" must be a string')
  return { type: 'text', text: part.text }
}

function readMessage (message: Body, param: string): TemplateMessage {
  const { role, content } = message
  if (role === 'tool' || role === 'function') throw new EngineError('unsupported', 'tool messages are not supported by this engine', { param: `${param}.role` })
  if (typeof role !== 'string' || !Object.hasOwn(ROLES, role)) refuse(`${param}.role`, '"role" must be system, developer, user or assistant')
  if (Array.isArray(message.tool_calls) && message.tool_calls.length > 0) throw new EngineError('unsupported', 'tool calls are not supported by this engine', { param: `${param}.tool_calls` })
  const known = ROLES[role] as string
  if (typeof content === 'string') return { role: known, content }
  if (content === null && role === 'assistant') return { role: known, content: '' }
  if (!Array.isArray(content) || content.length === 0) refuse(`${param}.content`, '"content" must be a string or a non-empty list of parts')
  return { role: known, content: (content as unknown[]).map((part, i) => readPart(part, `${param}.content[${i}]`)) }
}

/** The messages as the chat template takes them. Call `collectMedia` first: it checks the media parts. */
export function readMessages (body: Body): TemplateMessage[] {
  const { messages } = body
  if (!Array.isArray(messages) || messages.length === 0) refuse('messages', '"messages" must be a non-empty list')
  return (messages as unknown[]).map((message, i) => {
    const param = `messages[${i}]`
    if (!isObject(message)) refuse(param, 'a message must be an object')
    return readMessage(message, param)
  })
}
