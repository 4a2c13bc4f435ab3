/** The node that holds a conversation: the KV cache of its prefix, its pictures. */
import type { IncomingHttpHeaders } from 'node:http'
import { fingerprint, openingOf, type Body } from '../body/index.ts'
import type { NodeSnapshot } from '../registry/types.ts'
import { heaviest, IMBALANCE } from './rendezvous.ts'

/** Names the session of a request, for policy `session`. */
const SESSION_HEADER = 'x-session-id'

/** Where the text stands that a conversation begins with, by route. */
const OPENING_MEMBERS: Readonly<Record<string, string>> = { '/v1/chat/completions': 'messages', '/v1/messages': 'messages', '/v1/responses': 'input', '/v1/completions': 'prompt' }
/** A prompt alone grows with each turn: requests with the same beginning belong together, in bytes. */
const PROMPT_BYTES = 256
/** How far the end of the first message is looked for, in bytes. */
const MAX_OPENING = 1 << 20

/**
 * What all requests of one conversation, and few others, have in common: their messages up to the first that is not the
 * application's own. Where that has pictures, the first of these: other conversations about it find its features.
 */
export function prefixKey (body: Body, path: string): string | undefined {
  const name = OPENING_MEMBERS[path.split('?', 1)[0]!]
  const value = name === undefined ? undefined : body.json(name)
  if (value === undefined) return undefined
  const isList = value[0] === 0x5b
  if (name === 'prompt' || !isList) return fingerprint(value, 0, name === 'prompt' ? Math.min(PROMPT_BYTES, value.length) : value.length)
  const from = value.byteOffset - body.bytes.byteOffset
  const picture = body.media.find(({ span }) => span.start >= from && span.end <= from + value.length)
  const start = picture === undefined ? value.length : picture.span.start - from
  const opening = picture?.message === 0 ? undefined : openingOf(value, Math.min(start, MAX_OPENING))
  return opening === undefined && picture !== undefined ? picture.routeKey : fingerprint(value, 0, opening?.end ?? value.length)
}

/** What the client says that its requests belong together by. */
export function sessionKey (body: Body, { [SESSION_HEADER]: named }: IncomingHttpHeaders): string | undefined {
  for (const key of [named, body.scalar('prompt_cache_key'), body.scalar('user')]) if (typeof key === 'string' && key !== '') return key
  return undefined
}

/** The candidate that rendezvous hashing of the conversation's key names, of those that have not too much to do. @param work of this request, in tokens */
export function byConversation (key: string, candidates: readonly NodeSnapshot[], work: number, nodeTokens: number): NodeSnapshot {
  const speeds = candidates.reduce((sum, { speed }) => sum + speed, 0)
  const total = candidates.reduce((sum, { load }) => sum + load.work, work)
  const limit = Math.max(nodeTokens, IMBALANCE * total / speeds)
  return heaviest(key, candidates, ({ load, speed }) => load.work + work <= limit * speed)
}
