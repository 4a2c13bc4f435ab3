import { randomInt } from 'node:crypto'
import { AdapterError, type AdapterNode, type Call, type LeaseRef, type NodeInfo } from '../adapter.ts'
import { requestOk } from '../http/json.ts'
import { PROXY_HEADERS } from '../wire/headers.ts'
import { objectOf } from '../wire/json.ts'
import { CHAT } from './prefill-edits.ts'

/**
 * How an LMDeploy P names the session that keeps a prompt's KV blocks. D frees them by that name, so a P that does not
 * answer it runs out of memory. `named`: in a member of its own, as proposed to LMDeploy. `set`: the request's `session_id`
 * is the name (up to 0.12). `numbered`: a chat's `id` is the name, a completion's is not (0.13, 0.14). `none`: nowhere
 * (0.15 and later).
 */
export type Naming = 'named' | 'set' | 'numbered' | 'none'

export const UNNAMED = 'lmdeploy 0.15 and later does not name the session that keeps the KV blocks, so they could not be freed (InternLM/lmdeploy#4977)'

export interface PrefillAnswer {
  readonly id?: unknown
  readonly cache_session_id?: unknown
  readonly remote_session_id?: unknown
  readonly cache_block_ids?: unknown
  readonly remote_token_ids?: unknown
  readonly usage?: { readonly prompt_tokens?: unknown, readonly prompt_tokens_details?: { readonly cached_tokens?: unknown } }
}

/** Above every number that a server's own counter reaches. */
export function newSessionId (): number {
  return randomInt(2 ** 30, 2 ** 31 - 1)
}

function explicit ({ cache_session_id: cache, remote_session_id: remote }: PrefillAnswer): number | undefined {
  return [cache, remote].find((id): id is number => Number.isSafeInteger(id))
}

/** The session of an answer to a prefill; undefined when it is named nowhere. */
export function sessionOf (answer: PrefillAnswer): number | undefined {
  const named = explicit(answer)
  if (named !== undefined) return named
  const { id } = answer
  return (typeof id === 'string' || typeof id === 'number') && /^\d+$/.test(String(id)) ? Number(id) : undefined
}

/** Best effort, never throws. */
export async function freeSession (node: AdapterNode, session: number, call: Call): Promise<void> {
  const json = { remote_engine_id: node.id, remote_session_id: session }
  await requestOk(node, { method: 'POST', path: '/distserve/free_cache', json, idempotent: true, timeout: 5000 }, call).catch(() => {})
}

/** What a P keeps for a D that does not take it. Best effort, never throws. */
export async function releaseSession ({ node, wire }: LeaseRef, call: Call): Promise<void> {
  const { remote_session_id: session } = objectOf(wire)
  if (typeof session === 'number') await freeSession(node, session, call)
}

const known = new WeakMap<NodeInfo, Promise<Naming>>()

/** How this P names its sessions, found out once per process with a prompt of one word. Throws what any call throws. */
export function namingOf (node: AdapterNode, model: string, call: Call): Promise<Naming> {
  const found = node.info === undefined ? undefined : known.get(node.info)
  if (found !== undefined) return found
  const asked = ask(node, model, call)
  if (node.info !== undefined) {
    const { info } = node
    known.set(info, asked)
    asked.catch(() => { known.delete(info) })
  }
  return asked
}

/** No route of LMDeploy shows its version. A P that names no session keeps the one block of this prompt for good. */
async function ask (node: AdapterNode, model: string, call: Call): Promise<Naming> {
  const session = newSessionId()
  const json = {
    model,
    messages: [{ role: 'user', content: 'Hi' }],
    max_tokens: 1,
    max_completion_tokens: 1,
    temperature: 0,
    stream: false,
    session_id: session,
    with_cache: true,
    preserve_cache: true
  }
  const answer = await requestOk(node, { method: 'POST', path: CHAT, json, headers: PROXY_HEADERS }, call) as PrefillAnswer
  if (!Array.isArray(answer.cache_block_ids)) throw new AdapterError('REFUSED', `${node.id} answers a prefill without cache_block_ids: it is no prefill engine`, { node: node.id })
  const found = sessionOf(answer)
  if (found === undefined) return 'none'
  await freeSession(node, found, call)
  return explicit(answer) !== undefined ? 'named' : found === session ? 'set' : 'numbered'
}
