/** What a client may not write into a request for vLLM. */
import { AdapterError, type AdapterNode, type RequestBody } from '../adapter.ts'
import { openAiError } from '../wire/openai-error.ts'

/** Members that say which embeddings or KV blocks to take, and from where. The body has them out already; the client learns of it. */
const TRANSFERS: ReadonlySet<string> = new Set(['ec_transfer_params', 'kv_transfer_params'])

/**
 * vLLM believes a `uuid`: a picture under a taken one is answered with the stored picture, one of another size ends the
 * process, and `../` in it writes outside the shared folder. Embeddings from a client end the process when they do not
 * fit. Neither passes; embeddings do where `embeds` is `allow`.
 *
 * @throws AdapterError REJECTED, an answer of 400 that names the member
 */
export function refuseForged (node: AdapterNode, { privileged }: RequestBody, embeds: 'refuse' | 'allow'): void {
  for (const { param, kind } of privileged) {
    if (kind === 'embeddings' && embeds === 'allow') continue
    if (kind === 'control' && !TRANSFERS.has(param)) continue
    throw badRequest(node, `${param} is not for clients to set`, param, 'not_for_clients')
  }
}

export function badRequest ({ id }: AdapterNode, message: string, param: string | null, code: string): AdapterError {
  const body = Buffer.from(JSON.stringify({ error: openAiError(400, message, code, param) }))
  return new AdapterError('REJECTED', message, { node: id, response: { statusCode: 400, contentType: 'application/json', body } })
}
