/** What the planner reads of a request. */
import type { MediaItem } from '../../adapters/adapter.ts'
import type { IncomingHttpHeaders } from 'node:http'
import type { Body } from '../body/index.ts'
import type { NodeSnapshot } from '../registry/types.ts'
import { prefixKey, sessionKey } from './conversation.ts'
import { severalPrompts } from './prompts.ts'
import type { StageTimes } from './time-line.ts'

/** Why a request can't be disaggregated: one node must do both prefill and decode. */
export interface SingleNode {
  /** For people: `n greater than 1`. */
  readonly what: string
  /** The request's member that causes it. */
  readonly param?: string | undefined
  /** `request`: the client wrote it so. `attempt`: an earlier attempt has shown it. */
  readonly source: 'request' | 'attempt'
}

/** All the planner knows of a request. */
export interface RequestView {
  readonly model: string
  readonly media: readonly MediaItem[]
  /** Bodies of this route may mean media that the gateway does not see (an earlier response's, a form's): prefer nodes that could take some. */
  readonly opaque?: boolean
  /** Estimated, of text and media together. */
  readonly promptTokens?: number
  readonly singleNode?: SingleNode | undefined
  /** What the requests of its conversation have in common; undefined: nothing is known. Reads the body each time. */
  readonly conversation?: ((by: 'prefix' | 'session') => string | undefined) | undefined
  /** What its model's stages have taken at nodes of a role. */
  readonly times?: ((role: NodeSnapshot['role']) => StageTimes | undefined) | undefined
  /** Is an encoder known to have this item already? */
  readonly has?: ((encoder: NodeSnapshot, item: MediaItem) => boolean) | undefined
}

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
