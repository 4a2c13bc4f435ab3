import type { AdapterNode, Call } from '../adapter.ts'
import { requestOk } from '../http.ts'
import { isOurNode } from '../lmdeploy.ts'

/** LMDeploy's own api_server stops by itself when the connection closes, and knows sessions, not request ids. */
export async function abort (node: AdapterNode, requestId: string, call: Call): Promise<void> {
  if (!isOurNode(node)) return
  await requestOk(node, { method: 'POST', path: '/abort_request', json: { request_id: requestId }, timeout: 3000 }, call).catch(() => {})
}

/** Before a request is sent again: it may have been answered, and leases that nobody has read would be open until they expire. */
export async function abortUnread (node: AdapterNode, call: Call): Promise<void> {
  const id = call.headers['x-request-id']
  if (id !== undefined) await abort(node, id, call)
}
