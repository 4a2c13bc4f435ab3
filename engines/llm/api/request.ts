import { collectMedia, type MediaItem } from '../../encoder/media-parts.ts'
import { EngineError } from '../../service/errors.ts'
import type { LoadedModel } from '../../models/family.ts'
import type { TemplateMessage } from '../text/chat-template.ts'
import { matchEncoderResults } from './encoder-result.ts'
import { countPrompts } from './completion-prompts.ts'
import { readControl, type RequestTarget } from './control-fields.ts'
import { isEmpty, isObject, readBoolean, readInteger, readObject, refuse, refuseUnknown, type Body } from './fields.ts'
import { CHAT_FIELDS, COMPLETION_FIELDS, refuseUnsupported } from './known-fields.ts'
import { readMessages } from './messages.ts'
import { readGeneration, type GenerationParams } from './sampling.ts'
import type { EncoderResultEntry, MigrationRequest } from '../sequence/remote.ts'

/** A request as it was asked for, checked; no text tokenised, nothing fetched. */
export interface ParsedRequest {
  readonly params: GenerationParams
  /** Prompts in it. */
  readonly texts: number
  /** Its KV blocks are to be kept, and a migration request to be answered. */
  readonly preserve: boolean
  readonly input:
    | { readonly kind: 'chat', readonly messages: readonly TemplateMessage[], readonly kwargs: Body, readonly items: readonly MediaItem[], readonly results: readonly EncoderResultEntry[] }
    | { readonly kind: 'completion', readonly body: Body }
    | { readonly kind: 'migrated', readonly migration: MigrationRequest }
}

/** What every request has: an object, our model, perhaps LMDeploy's session id. */
export function readCall (value: unknown, model: LoadedModel): { body: Body, sessionId: number | undefined } {
  if (!isObject(value)) throw new EngineError('invalid_request', 'the body must be a JSON object')
  const name = value.model ?? model.name
  if (typeof name !== 'string') refuse('model', '"model" must be a string')
  if (name !== model.name) throw new EngineError('model_not_found', `the model ${JSON.stringify(name.slice(0, 100))} is not served here`, { param: 'model' })
  if (typeof (value.epd_tenant ?? '') !== 'string') refuse('epd_tenant', '"epd_tenant" must be a string')
  const sessionId = readInteger(value, 'session_id', { min: -1, max: Number.MAX_SAFE_INTEGER, fallback: -1 })
  return { body: value, sessionId: sessionId < 0 ? undefined : sessionId }
}

/** @throws EngineError naming the field at fault. */
export function readChat (body: Body, target: RequestTarget): ParsedRequest {
  refuseUnknown(body, CHAT_FIELDS)
  refuseUnsupported(body)
  const logprobs = readBoolean(body, 'logprobs', false)
  const top = readInteger(body, 'top_logprobs', { min: 0, max: 20, fallback: undefined })
  if (top !== undefined && !logprobs) refuse('top_logprobs', '"top_logprobs" is only allowed when "logprobs" is true')
  const { preserve, migration } = readControl(body, target, logprobs)
  const params = readParams(body, target, logprobs ? top ?? 0 : undefined)
  // What the client wrote was read by P, pictures and all.
  if (migration !== undefined) return { params, texts: 1, preserve, input: { kind: 'migrated', migration } }
  const items = collectMedia(body)
  if (target.role === 'decode' && items.length > 0) {
    throw new EngineError('unsupported', 'this engine has the role decode: pictures come to it only by the migration request of a prefill engine', { param: items[0]?.param })
  }
  const messages = readMessages(body)
  const kwargs = readObject(body.chat_template_kwargs ?? {}, 'chat_template_kwargs')
  return { params, texts: 1, preserve, input: { kind: 'chat', messages, kwargs, items, results: matchEncoderResults(body, items, target.model) } }
}

/** @throws EngineError naming the field at fault. */
export function readCompletion (body: Body, target: RequestTarget): ParsedRequest {
  refuseUnknown(body, COMPLETION_FIELDS)
  refuseUnsupported(body)
  const top = readInteger(body, 'logprobs', { min: 0, max: 5, fallback: undefined })
  const { preserve, migration } = readControl(body, target, top !== undefined)
  if (!isEmpty(body.encoder_result)) throw new EngineError('unsupported', 'completions take no media', { param: 'encoder_result' })
  const params = readParams(body, target, top)
  if (migration !== undefined) return { params, texts: 1, preserve, input: { kind: 'migrated', migration } }
  const texts = countPrompts(body)
  if (preserve && texts > 1) refuse('prompt', '"prompt" must be a single one with "preserve_cache"')
  return { params, texts, preserve, input: { kind: 'completion', body } }
}

/** A prefill engine stops after its first token, whatever was asked for. */
function readParams (body: Body, { role, model }: RequestTarget, topLogprobs: number | undefined): GenerationParams {
  const params = readGeneration(body, model, topLogprobs)
  return role === 'prefill' ? { ...params, maxTokens: 1 } : params
}
