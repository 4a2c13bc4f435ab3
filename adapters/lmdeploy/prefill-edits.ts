import type { BodyEdits, RequestBody } from '../adapter.ts'

export const CHAT = '/v1/chat/completions'

/** Members that would make P sample more than one token; above 1 they are set to 1. */
const AT_LEAST = ['min_tokens', 'min_new_tokens'] as const

/** P's share of the client's body: the prompt and one token, with the KV blocks kept for D. */
export function prefillEdits (body: RequestBody, path: string): Required<Pick<BodyEdits, 'set' | 'remove'>> {
  const set: Record<string, string> = { max_tokens: '1', stream: 'false', with_cache: 'true', preserve_cache: 'true' }
  if (path.startsWith(CHAT) || body.has('max_completion_tokens')) set.max_completion_tokens = '1'
  for (const name of AT_LEAST) {
    const value = body.scalar(name)
    if (typeof value === 'number' && value > 1) set[name] = '1'
  }
  return { set, remove: ['stream_options'] }
}
