import { AdapterError, type AdapterNode, type Call } from '../adapter.ts'
import { requestOk } from '../http/json.ts'
import type { ServerDetails } from '../probes.ts'

/** `unknown`: the check failed. The next probe repeats it. */
export type Vision = 'full' | 'none' | 'unknown'

/** One token from one picture may take seconds on a cold server. */
const TIMEOUT = 8000

/** A grey 64 x 64 PNG: small, and large enough for every processor's least size. */
const PICTURE = 'data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAEAAAABACAAAAACPAi4CAAAAKUlEQVR42u3MQREAAAwCIKMb3RD77SAA6VEEAoFAIBAIBAKBQCAQfA8G320AeXC6efoAAAAASUVORK5CYII='

export interface LmdeployDetails extends ServerDetails {
  readonly server: 'lmdeploy'
  readonly vision: Vision
}

/**
 * Does this server look at pictures? LMDeploy with `--language-model-only` drops them silently and answers 200, and no
 * route of it reports that; so one picture is sent, and the prompt tokens are counted with and without it.
 * Asked once per process: `info.details` keeps the answer.
 */
export async function checkVision (node: AdapterNode, model: string, call: Call): Promise<Vision> {
  const known = (node.info?.details as Partial<LmdeployDetails> | undefined)?.vision
  if (known === 'full' || known === 'none') return known
  try {
    const [without, withPicture] = await Promise.all([promptTokens(node, model, false, call), promptTokens(node, model, true, call)])
    if (without === undefined) return 'unknown'
    return withPicture !== undefined && withPicture > without ? 'full' : 'none'
  } catch (error) {
    if (call.signal.aborted) throw error
    call.log.warn({ err: error, node: node.id }, 'could not find out whether the node looks at pictures')
    return 'unknown'
  }
}

/** Undefined when the server rejects the request. */
async function promptTokens (node: AdapterNode, model: string, picture: boolean, call: Call): Promise<number | undefined> {
  const content = [{ type: 'text', text: 'Hi' }, ...(picture ? [{ type: 'image_url', image_url: { url: PICTURE } }] : [])]
  const json = { model, messages: [{ role: 'user', content }], max_tokens: 1, temperature: 0, stream: false }
  try {
    const answer = await requestOk(node, { method: 'POST', path: '/v1/chat/completions', json, timeout: TIMEOUT }, call)
    const tokens = (answer as { usage?: { prompt_tokens?: unknown } }).usage?.prompt_tokens
    return typeof tokens === 'number' ? tokens : undefined
  } catch (error) {
    if (AdapterError.is(error) && error.code === 'REJECTED') return undefined
    throw error
  }
}
