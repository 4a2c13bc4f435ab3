/** Which of the language models that can take a request gets it. */
import type { NodeSnapshot } from '../registry/types.ts'
import { byConversation } from './conversation.ts'
import { byPolicy, type PolicyName, type PolicyOptions, type PolicyRequest } from './policy.ts'
import { ANSWER_TOKENS } from './request.ts'

/** A shorter prompt is computed sooner than an uneven spread costs, in tokens. */
const SHORT_PROMPT = 64

/** The first of the language models by policy, as {@link byPolicy} has it. The policies of this package need no order for it. */
export function firstByPolicy (candidates: readonly NodeSnapshot[], request: PolicyRequest, options: PolicyOptions, avoid: ReadonlySet<string>): NodeSnapshot {
  if (candidates.length < 2) return candidates[0]!
  if (typeof options.policy === 'function') return byPolicy(byLoad(candidates, request.promptTokens), request, options, avoid)[0]!
  const doubt = ({ id, load }: NodeSnapshot): number => (avoid.has(id) ? 2 : 0) + (load.failing === true ? 1 : 0)
  const first = firstByName(candidates, request, options.policy, options.nodeTokens)
  if (doubt(first) === 0) return first
  const least = Math.min(...candidates.map(doubt))
  return firstByName(candidates.filter(node => doubt(node) === least), request, options.policy, options.nodeTokens)
}

function firstByName (candidates: readonly NodeSnapshot[], { promptTokens = 0, conversation }: PolicyRequest, policy: PolicyName, nodeTokens: number): NodeSnapshot {
  const key = policy === 'least-tokens' || (policy === 'prefix' && promptTokens < SHORT_PROMPT) ? undefined : conversation?.(policy)
  return key === undefined ? leastLoaded(candidates, promptTokens) : byConversation(key, candidates, promptTokens + ANSWER_TOKENS, nodeTokens)
}

/**
 * The fewest tokens in flight for a node's speed, this request's own included; of equals the one that has rested longest,
 * so that idle nodes take turns. All of them are compared, not two by chance: the gateway counts the loads itself, and
 * none is stale.
 */
function leastLoaded (nodes: readonly NodeSnapshot[], promptTokens = 0): NodeSnapshot {
  const own = promptTokens + ANSWER_TOKENS
  let first = nodes[0]!
  let least = loadOf(first, own)
  for (const node of nodes) {
    const load = loadOf(node, own)
    if (load < least || (load === least && node.load.usedAt < first.load.usedAt)) [first, least] = [node, load]
  }
  return first
}

/** By {@link leastLoaded}, all of them. */
function byLoad (nodes: readonly NodeSnapshot[], promptTokens = 0): readonly NodeSnapshot[] {
  const own = promptTokens + ANSWER_TOKENS
  return [...nodes].sort((a, b) => loadOf(a, own) - loadOf(b, own) || a.load.usedAt - b.load.usedAt)
}

function loadOf ({ load, speed }: NodeSnapshot, own: number): number {
  return (load.work + own) / speed
}
