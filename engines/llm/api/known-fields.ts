/** Which members a request may have. A member that is neither supported nor harmless is refused, never ignored. */
import { CONTROL_FIELDS, TENANT_FIELD } from '../../../adapters/wire/results.ts'
import { isEmpty, isObject, unsupported, type Json } from './fields.ts'

const SAMPLING = [
  'model', 'n', 'seed', 'temperature', 'top_p', 'top_k', 'min_p', 'repetition_penalty', 'presence_penalty', 'frequency_penalty', 'logit_bias',
  'max_tokens', 'max_completion_tokens', 'min_tokens', 'min_new_tokens', 'stop', 'stop_token_ids', 'include_stop_str_in_output', 'ignore_eos',
  'skip_special_tokens', 'logprobs', 'stream', 'stream_options', 'session_id', TENANT_FIELD
]

/** Accepted and ignored: they do not change the answer. */
const IGNORED = [
  'user', 'metadata', 'store', 'service_tier', 'safety_identifier', 'prompt_cache_key', 'prompt_cache_retention', 'prediction', 'reasoning_effort', 'verbosity',
  'parallel_tool_calls', 'spaces_between_special_tokens', 'do_preprocess', 'enable_thinking', 'priority', 'request_id'
]

const CHAT = [
  'messages', 'top_logprobs', 'response_format', 'tools', 'tool_choice', 'functions', 'function_call', 'modalities', 'audio', 'web_search_options',
  'mm_processor_kwargs', 'media_io_kwargs', 'chat_template_kwargs', 'return_token_ids', 'return_logprob', 'return_routed_experts'
]

export const CHAT_FIELDS: ReadonlySet<string> = new Set([...SAMPLING, ...IGNORED, ...CONTROL_FIELDS, ...CHAT])
export const COMPLETION_FIELDS: ReadonlySet<string> = new Set([...SAMPLING, ...IGNORED, ...CONTROL_FIELDS, 'prompt', 'suffix', 'echo', 'best_of'])

/** Refuses known members that this engine does not support, unless their value asks for nothing. */
export function refuseUnsupported (body: Json): void {
  const format = body.response_format
  if (!isEmpty(format) && (!isObject(format) || format.type !== 'text')) unsupported('response_format', '"response_format" must be { "type": "text" }: constrained output is not supported')
  for (const key of ['tools', 'functions', 'audio', 'web_search_options', 'return_token_ids', 'return_logprob', 'return_routed_experts', 'echo']) {
    if (!isEmpty(body[key])) unsupported(key, `"${key}" is not supported by this engine`)
  }
  for (const key of ['tool_choice', 'function_call']) {
    if (!isEmpty(body[key]) && body[key] !== 'none' && body[key] !== 'auto') unsupported(key, `"${key}" is not supported by this engine`)
  }
  const { modalities } = body
  if (!isEmpty(modalities) && !(Array.isArray(modalities) && modalities.every(m => m === 'text'))) unsupported('modalities', '"modalities" must be ["text"]')
  if (typeof body.suffix === 'string' && body.suffix !== '') unsupported('suffix', '"suffix" is not supported by this engine')
  if (!isEmpty(body.best_of) && body.best_of !== (body.n ?? 1)) unsupported('best_of', '"best_of" must equal "n"')
}
