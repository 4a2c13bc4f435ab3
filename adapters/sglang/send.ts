import { TimeLimit } from '../abort.ts'
import { AdapterError, type AdapterNode, type Call, type RequestBody, type UpstreamResponse } from '../adapter.ts'
import { postStream, type HttpRequest } from '../http.ts'
import { REQUEST_ID_HEADER } from '../wire/headers.ts'
import { detailsOf } from './info.ts'

/** Longer than a language server waits for embeddings (SGLANG_ENCODER_RECV_TIMEOUT, 180 s) and answers, in milliseconds. */
const UNCUT_MS = 600_000
/** Routes whose requests take a `rid`. */
const NAMED: ReadonlySet<string> = new Set(['/v1/chat/completions', '/v1/completions'])

/** A client's own would make the server wait for a prefill that is not there. */
const BOOTSTRAP = ['bootstrap_host', 'bootstrap_port', 'bootstrap_room'] as const

/** Where prefill and decode of one request meet. */
export type Bootstrap = Readonly<Record<typeof BOOTSTRAP[number], string | number>>

/** Passes the request on under the gateway's id, which SGLang repeats in its calls to encoders. */
export async function sendSglang (node: AdapterNode, path: string, body: RequestBody, call: Call, bootstrap?: Bootstrap): Promise<UpstreamResponse> {
  const vision = node.vision ?? node.info?.vision
  if (body.media.length > 0 && vision === 'none') throw new AdapterError('REFUSED', `${node.id} has no vision: media would be lost`, { node: node.id })
  const set: Record<string, string> = {}
  if (NAMED.has(path.split('?', 1)[0]!)) set.rid = JSON.stringify(call.headers[REQUEST_ID_HEADER])
  for (const [name, value] of Object.entries(bootstrap ?? {})) set[name] = JSON.stringify(value)
  const request = { path, body: body.splice({ set, remove: BOOTSTRAP.filter(name => set[name] === undefined) }) }
  const details = detailsOf(node)
  const fragile = body.media.length > 0 && details?.languageOnly === true && details.transfer !== 'zmq_to_tokenizer'
  return fragile ? await uncut(request, node, call) : await postStream(node, request, call)
}

/**
 * Sends a request that is not cut before its first event, whatever its caller does. SGLang 0.5.23 dies when a client
 * leaves, or the request is aborted, while the scheduler waits for embeddings: `TypeError: object of type 'NoneType' has
 * no len()`. With the first event they are there.
 */
async function uncut (request: Omit<HttpRequest, 'method'>, node: AdapterNode, call: Call): Promise<UpstreamResponse> {
  if (call.signal.aborted) throw call.signal.reason
  const own = new TimeLimit(UNCUT_MS)
  try {
    const response = await postStream(node, request, { ...call, signal: own })
    call.signal.addEventListener('abort', () => { own.abort(call.signal.reason) })
    // The caller has given up meanwhile, so that this answer has no reader.
    if (call.signal.aborted) own.abort(call.signal.reason)
    return response
  } finally {
    own.clear()
  }
}
