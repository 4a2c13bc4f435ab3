import { collectMedia, type MediaItem } from '../../encoder/media-parts.ts'
import type { LoadedModel } from '../../models/family.ts'
import { EngineError } from '../../service/errors.ts'
import type { Node } from '../grammar/automaton.ts'
import type { MigrationRequest, RemoteMedia } from '../sequence/prompt.ts'
import type { TemplateMessage } from '../text/chat-template.ts'
import { readForm } from './answer-form.ts'
import { readControl, type RequestTarget } from './control-fields.ts'
import { matchEncoderResults } from './encoder-result.ts'
import { isEmpty, isObject, readBoolean, readInteger, readObject, refuse, unsupported, type Json } from './fields.ts'
import { countPrompts, readMessages } from './input.ts'
import { asChat, inItsWords, readInput } from './response-request.ts'
import { checkSize, readTools, type Tools } from './tools.ts'
import { refuseUnsupported } from './unsupported.ts'
import { readGeneration, type GenerationParams } from './sampling.ts'

/** A request after its checks; no text is tokenised yet and no picture fetched. */
export interface ParsedRequest {
  readonly params: GenerationParams
  /** How many prompts it has. */
  readonly texts: number
  /** What the answer's text may be; undefined: any text. */
  readonly form: Node | undefined
  /** What the model may call. */
  readonly tools: Tools | undefined
  /** Put the KV blocks under a lease and answer a migration request. */
  readonly preserve: boolean
  readonly input:
    | { readonly kind: 'chat', readonly messages: readonly TemplateMessage[], readonly kwargs: Json, readonly items: readonly MediaItem[], readonly results: readonly RemoteMedia[] }
    | { readonly kind: 'completion', readonly body: Json }
    | { readonly kind: 'migrated', readonly migration: MigrationRequest }
}

/** Checks what all requests have: an object, this engine's model, perhaps a tenant and LMDeploy's session id. */
export function readCall (value: unknown, model: LoadedModel): { body: Json, sessionId: number | undefined } {
  if (!isObject(value)) throw new EngineError('invalid_request', 'the body must be a JSON object')
  const name = value.model ?? model.name
  if (typeof name !== 'string') refuse('model', '"model" must be a string')
  if (name !== model.name) throw new EngineError('model_not_found', `the model ${JSON.stringify(name.slice(0, 100))} is not served here`, { param: 'model' })
  if (typeof (value.epd_tenant ?? '') !== 'string') refuse('epd_tenant', '"epd_tenant" must be a string')
  const sessionId = readInteger(value, 'session_id', { min: -1, max: Number.MAX_SAFE_INTEGER, fallback: -1 })
  return { body: value, sessionId: sessionId < 0 ? undefined : sessionId }
}

/** @throws EngineError naming the field at fault. */
export function readChat (body: Json, target: RequestTarget, messagesOf = readMessages): ParsedRequest {
  refuseUnsupported(body)
  const logprobs = readBoolean(body, 'logprobs', false)
  const top = readInteger(body, 'top_logprobs', { min: 0, max: 20, fallback: undefined })
  if (top !== undefined && !logprobs) refuse('top_logprobs', '"top_logprobs" is only allowed when "logprobs" is true')
  const { preserve, migration } = readControl(body, target, logprobs)
  const params = readParams(body, target, logprobs ? top ?? 0 : undefined)
  const form = readForm(body)
  const tools = readTools(body)
  // P has read the client's messages and pictures.
  if (migration !== undefined) return { params, texts: 1, form, tools, preserve, input: { kind: 'migrated', migration } }
  const items = collectMedia(body)
  if (target.role === 'decode' && items.length > 0) {
    throw new EngineError('unsupported', 'this engine has the role decode: pictures come to it only by the migration request of a prefill engine', { param: items[0]?.param })
  }
  const messages = messagesOf(body)
  const given = readObject(body.chat_template_kwargs ?? {}, 'chat_template_kwargs')
  checkSize(given, 'chat_template_kwargs')
  const kwargs = tools === undefined ? given : { ...given, tools: tools.given }
  return { params, texts: 1, form, tools, preserve, input: { kind: 'chat', messages, kwargs, items, results: target.ahead === true ? [] : matchEncoderResults(body, items, target.model) } }
}

/** @throws EngineError naming the field at fault. */
export function readResponse (body: Json, target: RequestTarget): ParsedRequest {
  const chat = asChat(body)
  try {
    return readChat(chat, target, readInput)
  } catch (err) {
    throw inItsWords(err)
  }
}

/** @throws EngineError naming the field at fault. */
export function readCompletion (body: Json, target: RequestTarget): ParsedRequest {
  refuseUnsupported(body)
  if (!isEmpty(body.tools)) unsupported('tools', 'completions take no tools')
  const top = readInteger(body, 'logprobs', { min: 0, max: 5, fallback: undefined })
  const { preserve, migration } = readControl(body, target, top !== undefined)
  if (!isEmpty(body.encoder_result)) unsupported('encoder_result', 'completions take no media')
  const params = readParams(body, target, top)
  const form = readForm(body)
  if (migration !== undefined) return { params, texts: 1, form, tools: undefined, preserve, input: { kind: 'migrated', migration } }
  const texts = countPrompts(body)
  if (preserve && texts > 1) refuse('prompt', '"prompt" must be a single one with "preserve_cache"')
  return { params, texts, form, tools: undefined, preserve, input: { kind: 'completion', body } }
}

/** A prefill engine stops after its first token, whatever the request says. */
function readParams (body: Json, { role, model }: RequestTarget, topLogprobs: number | undefined): GenerationParams {
  const params = readGeneration(body, model, topLogprobs)
  return role === 'prefill' ? { ...params, maxTokens: 1 } : params
}
