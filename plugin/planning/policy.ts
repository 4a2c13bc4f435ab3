/** Which of the nodes that can take a request comes first: the one seam for routing policy. */
import type { MediaItem, Stage } from '../../adapters/adapter.ts'
import type { NodeSnapshot } from '../registry/types.ts'
import { byConversation } from './conversation.ts'
import { last } from './rendezvous.ts'
import { ANSWER_TOKENS, type RequestView } from './request.ts'

export interface PolicyRequest extends RequestView {
  readonly stage: Stage
  /** Stage `encode`: the media item to place. Policies are asked once per item. */
  readonly item?: MediaItem | undefined
}

/**
 * Orders the nodes that can take a request at one stage, the first choice first. `candidates` come in the order of the
 * default policy. Nodes that the answer leaves out come last; it can't add any.
 */
export type Policy = (candidates: readonly NodeSnapshot[], request: PolicyRequest) => readonly NodeSnapshot[]

/** What option `routing.policy` may name, beside a function. */
export const POLICIES = ['prefix', 'least-tokens', 'session'] as const
export type PolicyName = typeof POLICIES[number]

export interface PolicyOptions {
  readonly policy: PolicyName | Policy
  /** Tokens that a node may have in flight before conversations spill over from it. */
  readonly nodeTokens: number
}

/** A shorter prompt is computed sooner than an uneven spread costs, in tokens. */
const SHORT_PROMPT = 64

/** Candidates by policy; language models that have failed a moment ago come behind the others, nodes in `avoid` last. @param candidates in the order of `least-tokens`; encoders by hash of the item */
export function byPolicy (candidates: readonly NodeSnapshot[], request: PolicyRequest, { policy, nodeTokens }: PolicyOptions, avoid: ReadonlySet<string>): readonly NodeSnapshot[] {
  if (candidates.length < 2) return candidates
  const ordered = typeof policy === 'function' ? complete(policy(candidates, request), candidates) : byName(candidates, request, policy, nodeTokens)
  return last(request.stage === 'encode' ? ordered : last(ordered, ({ load }) => load.failing === true), ({ id }) => avoid.has(id))
}

function byName (candidates: readonly NodeSnapshot[], { stage, promptTokens = 0, conversation }: PolicyRequest, policy: PolicyName, nodeTokens: number): readonly NodeSnapshot[] {
  if (stage === 'encode' || policy === 'least-tokens' || (policy === 'prefix' && promptTokens < SHORT_PROMPT)) return candidates
  const key = conversation?.(policy)
  return key === undefined ? candidates : byConversation(key, candidates, promptTokens + ANSWER_TOKENS, nodeTokens)
}

function complete (ordered: readonly NodeSnapshot[], candidates: readonly NodeSnapshot[]): readonly NodeSnapshot[] {
  return [...new Set([...ordered.filter(node => candidates.includes(node)), ...candidates])]
}

/**
 * The fewest tokens in flight for a node's speed, this request's own included; of equals the one that has rested longest,
 * so that idle nodes take turns. All of them are compared, not two by chance: the gateway counts the loads itself, and
 * none is stale.
 */
export function byLoad (nodes: readonly NodeSnapshot[], promptTokens = 0): readonly NodeSnapshot[] {
  if (nodes.length < 2) return nodes
  const own = promptTokens + ANSWER_TOKENS
  const load = ({ load, speed }: NodeSnapshot): number => (load.work + own) / speed
  return [...nodes].sort((a, b) => load(a) - load(b) || a.load.usedAt - b.load.usedAt)
}
