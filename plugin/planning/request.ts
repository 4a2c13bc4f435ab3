/** What the planner reads of a request. */
import type { IncomingHttpHeaders } from 'node:http'
import type { Body } from '../body/index.ts'
import { prefixKey, sessionKey } from './conversation.ts'
import { severalPrompts } from './prompts.ts'
import type { RequestView, SingleNode } from './view.ts'

const COMPLETIONS = '/v1/completions'
/** Routes that adapters can disaggregate. */
const DISAGGREGATED: ReadonlySet<string> = new Set(['/v1/chat/completions', COMPLETIONS])
/** Routes whose bodies have all their media in parts of messages. */
const SCANNED: ReadonlySet<string> = new Set([...DISAGGREGATED, '/v1/messages', '/v1/embeddings'])
/** Of JSON text in a Latin script; an estimate for choosing a plan, not a count. */
const BYTES_PER_TOKEN = 4
/** An answer's length is not known before; this is what a chat's often comes to, in tokens. */
export const ANSWER_TOKENS = 256

/** @param found what an earlier attempt to disaggregate the request has shown */
export function viewRequest (body: Body, path: string, headers: IncomingHttpHeaders, found?: SingleNode): RequestView {
  return {
    model: body.model,
    media: body.media,
    opaque: !SCANNED.has(path),
    promptTokens: promptTokens(body),
    singleNode: found ?? singleNodeFor(body, path),
    conversation: by => by === 'prefix' ? prefixKey(body, path) : sessionKey(body, headers)
  }
}

/** Estimated tokens of the whole prompt. */
export function promptTokens (body: Body): number {
  return body.media.reduce((sum, item) => sum + item.tokens, Math.ceil(body.textBytes / BYTES_PER_TOKEN))
}

/** Tokens that a language model has in flight for it, from the plan to the last byte. */
export function workOf (body: Body): number {
  return promptTokens(body) + ANSWER_TOKENS
}

/** P's one token and its KV blocks begin one answer to one prompt. */
function singleNodeFor (body: Body, path: string): SingleNode | undefined {
  if (!DISAGGREGATED.has(path)) return { what: 'this route', source: 'request' }
  for (const param of ['n', 'best_of']) {
    const value = body.scalar(param)
    if (typeof value === 'number' && value > 1) return { what: `${param} greater than 1`, param, source: 'request' }
  }
  const prompt = path === COMPLETIONS ? body.json('prompt') : undefined
  return prompt !== undefined && severalPrompts(prompt) ? { what: 'several prompts', param: 'prompt', source: 'request' } : undefined
}
