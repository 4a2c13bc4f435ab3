import { collectMedia, type MediaItem } from '../../encoder/media-parts.ts'
import { EngineError } from '../../errors.ts'
import type { LoadedModel } from '../../models/family.ts'
import type { TemplateMessage } from '../chat-template.ts'
import { matchEncoderResults, type EncoderResultEntry } from '../encoder-result.ts'
import { countPrompts } from './completion-prompts.ts'
import { isObject, readBoolean, readInteger, readObject, refuse, refuseUnknown, type Body } from './fields.ts'
import { CHAT_FIELDS, COMPLETION_FIELDS, refuseMigration, refuseUnsupported } from './known-fields.ts'
import { readMessages } from './messages.ts'
import { readGeneration, type GenerationParams } from './sampling.ts'

/** A request as it was asked for, checked; no text tokenised, nothing fetched. */
export interface ParsedRequest {
  readonly params: GenerationParams
  /** Prompts in it. */
  readonly texts: number
  readonly input:
    | { readonly kind: 'chat', readonly messages: readonly TemplateMessage[], readonly kwargs: Body, readonly items: readonly MediaItem[], readonly results: readonly EncoderResultEntry[] }
    | { readonly kind: 'completion', readonly body: Body }
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
export function readChat (body: Body, model: LoadedModel): ParsedRequest {
  refuseUnknown(body, CHAT_FIELDS)
  refuseUnsupported(body)
  refuseMigration(body)
  const logprobs = readBoolean(body, 'logprobs', false)
  const top = readInteger(body, 'top_logprobs', { min: 0, max: 20, fallback: undefined })
  if (top !== undefined && !logprobs) refuse('top_logprobs', '"top_logprobs" is only allowed when "logprobs" is true')
  const params = readGeneration(body, model, logprobs ? top ?? 0 : undefined)
  const items = collectMedia(body)
  const messages = readMessages(body)
  const kwargs = readObject(body.chat_template_kwargs ?? {}, 'chat_template_kwargs')
  return { params, texts: 1, input: { kind: 'chat', messages, kwargs, items, results: matchEncoderResults(body, items, model) } }
}

/** @throws EngineError naming the field at fault. */
export function readCompletion (body: Body, model: LoadedModel): ParsedRequest {
  refuseUnknown(body, COMPLETION_FIELDS)
  refuseUnsupported(body)
  refuseMigration(body)
  const encoderResult = body.encoder_result
  if (Array.isArray(encoderResult) && encoderResult.length > 0) throw new EngineError('unsupported', 'completions take no media', { param: 'encoder_result' })
  const params = readGeneration(body, model, readInteger(body, 'logprobs', { min: 0, max: 5, fallback: undefined }))
  return { params, texts: countPrompts(body), input: { kind: 'completion', body } }
}
