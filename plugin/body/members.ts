import { CONTROL_FIELDS as OURS, TENANT_FIELD } from '../../adapters/wire/results.ts'
import { epdError } from '../errors.ts'

/**
 * Members by which a gateway says to an engine what to pull, from which engine, and for which customer. No client may
 * send them: an engine would read the memory blocks of other requests, reveal what its caches hold, hang, or die (InternLM/lmdeploy#4965).
 */
export const CONTROL_FIELDS: readonly string[] = [
  ...OURS, TENANT_FIELD, 'ec_transfer_params', 'kv_transfer_params'
]

/** Members whose own members some engine merges with control fields (vLLM's `extra_args`). */
export const GUARDED_MEMBERS: readonly string[] = ['vllm_xargs']

/** How large the prompt of a chat is, at least. */
export interface PromptSize {
  /** Messages and their parts. */
  readonly messages: number
  /** Of the messages' text, in UTF-16 code units. */
  readonly characters: number
}

/** @param member one of {@link GUARDED_MEMBERS}. @throws EPD_ERR_INVALID_VALUE when `name`, a member of it, is a control field */
export function refuseControl (member: string | undefined, name: string | undefined): void {
  if (name === undefined || !CONTROL_FIELDS.includes(name)) return
  const param = `${member}.${name}`
  throw epdError('EPD_ERR_INVALID_VALUE', [`${param} is not for clients to set`], { param })
}
