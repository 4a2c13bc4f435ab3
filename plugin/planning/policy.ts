/** In which order nodes are asked: the one seam for routing policy. */
import type { MediaItem, Stage } from '../../adapters/adapter.ts'
import type { NodeSnapshot } from '../registry/types.ts'
import { last } from './rendezvous.ts'
import type { RequestView } from './view.ts'

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

/** Candidates by policy; language models that have failed a moment ago come behind the others, nodes in `avoid` last. @param candidates in the order of `least-tokens`; encoders by hash of the item */
export function byPolicy (candidates: readonly NodeSnapshot[], request: PolicyRequest, { policy }: PolicyOptions, avoid: ReadonlySet<string>): readonly NodeSnapshot[] {
  if (candidates.length < 2) return candidates
  const ordered = typeof policy === 'function' ? complete(policy(candidates, request), candidates) : candidates
  const sound = request.stage === 'encode' ? ordered : last(ordered, ({ load }) => load.failing === true)
  return avoid.size === 0 ? sound : last(sound, ({ id }) => avoid.has(id))
}

function complete (ordered: readonly NodeSnapshot[], candidates: readonly NodeSnapshot[]): readonly NodeSnapshot[] {
  const known = new Set(candidates)
  return [...new Set([...ordered.filter(node => known.has(node)), ...candidates])]
}
