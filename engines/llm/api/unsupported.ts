/**
 * Members of a request that this engine does not support and that would change the answer: each is refused by name, unless its
 * value asks for nothing. Members that no list has are ignored, as other servers do: clients send what some other server takes.
 */
import { isEmpty, unsupported, type Json } from './fields.ts'

const UNSUPPORTED = [
  // OpenAI
  'functions', 'audio', 'web_search_options', 'echo', 'suffix',
  // vLLM, SGLang and LMDeploy: the output's form
  'guided_json', 'guided_regex', 'guided_choice', 'guided_grammar', 'structured_outputs', 'json_schema', 'regex', 'ebnf', 'structural_tag',
  // how tokens are chosen
  'use_beam_search', 'allowed_token_ids', 'bad_words', 'bad_words_ids', 'logits_processors', 'custom_logit_processor',
  // what the model reads
  'chat_template', 'documents', 'continue_final_message', 'prompt_embeds', 'truncate_prompt_tokens', 'lora_path', 'lora_request', 'input_ids',
  // what the answer has beside text
  'prompt_logprobs', 'return_token_ids', 'return_logprob', 'return_routed_experts', 'return_hidden_states'
] as const

/** @throws EngineError `unsupported` naming the member */
export function refuseUnsupported (body: Json): void {
  for (const key of UNSUPPORTED) {
    if (!isEmpty(body[key]) && body[key] !== '') unsupported(key, `"${key}" is not supported by this engine`)
  }
  const { modalities, function_call: call } = body
  if (!isEmpty(call) && call !== 'none' && call !== 'auto') unsupported('function_call', '"function_call" is not supported by this engine')
  if (!isEmpty(modalities) && !(Array.isArray(modalities) && modalities.every(m => m === 'text'))) unsupported('modalities', '"modalities" must be ["text"]')
  if (!isEmpty(body.best_of) && body.best_of !== (body.n ?? 1)) unsupported('best_of', '"best_of" must equal "n"')
  if (body.add_generation_prompt === false) unsupported('add_generation_prompt', '"add_generation_prompt" must be true')
}
