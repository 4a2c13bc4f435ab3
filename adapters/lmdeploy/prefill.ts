import { AdapterError, type Call, type Handoff, type PrefillJob } from '../adapter.ts'
import { requestOk } from '../http/json.ts'
import { health } from '../probes.ts'
import { MIGRATION_PROTOCOL } from '../wire/distserve.ts'
import { PROXY_HEADERS } from '../wire/headers.ts'
import { numberOf } from '../wire/json.ts'
import { CHAT, prefillEdits } from './prefill-edits.ts'
import { freeSession, namingOf, newSessionId, sessionOf, UNNAMED, type PrefillAnswer } from './sessions.ts'

/**
 * P of a real LMDeploy. What D needs is spread over its answer, and which session to free depends on its version; for a
 * completion some versions answer another number than the session's, and then one node must serve it.
 */
export async function prefillLmdeploy (job: PrefillJob, call: Call): Promise<Handoff> {
  const { node, body, path = CHAT } = job
  const naming = await namingOf(node, body.model, call)
  if (naming === 'none') throw new AdapterError('REFUSED', `${node.id}: ${UNNAMED}`, { node: node.id })
  if (naming === 'numbered' && !path.startsWith(CHAT)) throw singleNode(job, 'of a completion it does not name the session')
  const { set, remove } = prefillEdits(body, path)
  const session = naming === 'set' ? newSessionId() : undefined
  // A session of the client's own would be occupied until D has taken it over.
  const edits = session === undefined ? { set, remove: [...remove, 'session_id'] } : { set: { ...set, session_id: String(session) }, remove }
  const answer = await requestOk(node, { method: 'POST', path, slices: body.splice(edits), headers: PROXY_HEADERS, timeout: 0 }, call, failure =>
    // A bare 500: LMDeploy's code fails (IndexError) when the first token ends the answer.
    failure.statusCode === 500 && failure.error.message === undefined ? singleNode(job, 'its first token ends the answer') : undefined
  ).catch(async (error: unknown) => {
    if (AdapterError.is(error) && error.singleNode) {
      await health(node, call)
      if (session !== undefined) await freeSession(node, session, call)
    }
    throw error
  })
  return await handoffOf(job, answer as PrefillAnswer, call)
}

async function handoffOf (job: PrefillJob, answer: PrefillAnswer, call: Call): Promise<Handoff> {
  const { node } = job
  const session = sessionOf(answer)
  if (session === undefined) throw new AdapterError('REFUSED', `${node.id}: ${UNNAMED}`, { node: node.id })
  const { cache_block_ids: blocks, remote_token_ids: tokens, usage } = answer
  if (!Array.isArray(blocks) || !Array.isArray(tokens) || tokens.length === 0) {
    await freeSession(node, session, call)
    throw Array.isArray(blocks) ? singleNode(job, 'it has sampled no token') : new AdapterError('UNAVAILABLE', `${node.id} answered a prefill without cache_block_ids`, { node: node.id, how: 'nonsense' })
  }
  return {
    node: node.id,
    lease: `session ${session}`,
    wire: {
      protocol: MIGRATION_PROTOCOL.rdma,
      remote_engine_id: node.id,
      remote_session_id: session,
      remote_token_id: tokens.at(-1) as unknown,
      remote_block_ids: blocks as unknown[],
      is_dummy_prefill: false
    },
    tokens: numberOf(usage?.prompt_tokens),
    cached: numberOf(usage?.prompt_tokens_details?.cached_tokens)
  }
}

/** P is well, but can't share this very request with a D. */
function singleNode ({ node }: PrefillJob, reason: string): AdapterError {
  return new AdapterError('KV_GONE', `${node.id} can't share this request: ${reason}`, { node: node.id, singleNode: true })
}
