import type { AdapterNode, Call } from '../adapter.ts'
import { requestOk } from '../http.ts'
import { isOurNode } from '../lmdeploy.ts'

/** LMDeploy's own api_server stops by itself when the connection closes, and knows sessions, not request ids. */
export async function abort (node: AdapterNode, requestId: string, call: Call): Promise<void> {
  if (!isOurNode(node)) return
  await requestOk(node, { method: 'POST', path: '/abort_request', json: { request_id: requestId }, idempotent: true, timeout: 3000 }, call).catch(() => {})
}

/** A request that is sent again says so: the first may have been answered, and leases that nobody has read would be open until they expire. */
export const SENT_AGAIN: Readonly<Record<string, string>> = { 'x-epd-again': '1' }
