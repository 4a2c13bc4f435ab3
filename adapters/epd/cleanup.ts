import type { AdapterNode, Call, LeaseRef } from '../adapter.ts'
import { requestOk } from '../http/json.ts'
import { objectOf } from '../wire/json.ts'

/**
 * Ends a lease on features or KV blocks, also right after the consumer's ACK: a lease ends once, repeats do nothing.
 * Best effort, never throws.
 */
export async function freeLease ({ node, lease, wire }: LeaseRef, call: Call): Promise<void> {
  const json = { remote_engine_id: node.id, remote_session_id: objectOf(wire).remote_session_id, lease }
  await requestOk(node, { method: 'POST', path: '/distserve/free_cache', json, idempotent: true, timeout: 5000 }, call).catch(() => {})
}

/** Stops a request by its id. Best effort, never throws. */
export async function abortEpd (node: AdapterNode, requestId: string, call: Call): Promise<void> {
  await requestOk(node, { method: 'POST', path: '/abort_request', json: { request_id: requestId }, idempotent: true, timeout: 3000 }, call).catch(() => {})
}
