/** Which of the nodes that can take a request comes first: the one seam for routing policy. */
import type { MediaItem, Stage } from '../../adapters/adapter.ts'
import type { NodeSnapshot } from '../registry/types.ts'
import type { RequestView } from './request.ts'

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

/** What option `routing.policy` may name. `least-load` is the order in which candidates come. */
export const POLICIES = {
  'least-load': candidates => candidates
} satisfies Record<string, Policy>

export type PolicyName = keyof typeof POLICIES

/** Candidates by policy; nodes in `avoid` come last. @param candidates in the order of the default policy */
export function byPolicy (candidates: readonly NodeSnapshot[], request: PolicyRequest, policy: PolicyName | Policy, avoid: ReadonlySet<string>): readonly NodeSnapshot[] {
  if (candidates.length < 2) return candidates
  const ordered = typeof policy === 'function' ? complete(policy(candidates, request), candidates) : POLICIES[policy](candidates)
  return last(ordered, node => avoid.has(node.id))
}

function complete (ordered: readonly NodeSnapshot[], candidates: readonly NodeSnapshot[]): readonly NodeSnapshot[] {
  return [...new Set([...ordered.filter(node => candidates.includes(node)), ...candidates])]
}

/** `nodes` with those that meet `condition` at the end. */
export function last (nodes: readonly NodeSnapshot[], condition: (node: NodeSnapshot) => boolean): readonly NodeSnapshot[] {
  return nodes.some(condition) ? [...nodes.filter(node => !condition(node)), ...nodes.filter(condition)] : nodes
}

/**
 * Default order of language models: the fewest requests in flight for a node's speed, then the fewest tokens. At
 * prefill nodes tokens come first: a long prompt keeps one busier than many short ones.
 */
export function byLoad (nodes: readonly NodeSnapshot[], stage: Stage = 'decode'): readonly NodeSnapshot[] {
  const requests = ({ load, speed }: NodeSnapshot): number => (load.requests + 1) / speed
  const tokens = ({ load, speed }: NodeSnapshot): number => load.tokens / speed
  const [first, second] = stage === 'prefill' ? [tokens, requests] : [requests, tokens]
  return nodes.length < 2 ? nodes : [...nodes].sort((a, b) => first(a) - first(b) || second(a) - second(b))
}
