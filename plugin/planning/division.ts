/** Prefill and decode on two nodes or on one: who could, and what is preferred. */
import type { NodeSnapshot, RegistrySnapshot } from '../registry/index.ts'
import { leastLoaded, pairs, usable, type Pools } from './candidates.ts'
import type { RequestView } from './request.ts'
import type { PlanOptions, Refusal } from './types.ts'

/** Nodes that can begin a request, and why it would be these. */
export interface Beginners {
  /** `divided`: prefill nodes. `alone`: decode nodes that take requests nobody has prefilled. */
  readonly kind: 'whole' | 'divided' | 'alone'
  readonly nodes: readonly NodeSnapshot[]
  readonly reason: string
}

/** The tokens of a prompt are estimated, and a prefill node may hang on one that is too long. */
const MARGIN = 1.5

function tooLong ({ info }: NodeSnapshot, tokens: number): boolean {
  return info?.maxPrefillTokens !== undefined && tokens * MARGIN > info.maxPrefillTokens
}

/** Decode nodes that can take over from P; those linked to it, where there are any. */
function partners (prefill: NodeSnapshot, decodes: readonly NodeSnapshot[], snapshot: RegistrySnapshot): readonly NodeSnapshot[] {
  const fitting = decodes.filter(decode => usable(decode, 'decode') && pairs(prefill, decode, snapshot, 'kv:'))
  const linked = fitting.filter(decode => snapshot.link(prefill.id, decode.id) === 'linked')
  if (linked.length > 0) return linked
  const sound = fitting.filter(decode => snapshot.link(prefill.id, decode.id) !== 'failed')
  return sound.length > 0 ? sound : fitting
}

/** D is chosen apart from P, by its own load, among those that work with P. */
export function decodeFor (prefill: NodeSnapshot, { decodes }: Pools, snapshot: RegistrySnapshot, avoid: ReadonlySet<string>): NodeSnapshot {
  return leastLoaded(partners(prefill, decodes, snapshot), avoid)!
}

/** Prefill nodes to avoid: those that have failed, and those left with no partner but ones that have. */
export function shunned (nodes: readonly NodeSnapshot[], { decodes }: Pools, snapshot: RegistrySnapshot, avoid: ReadonlySet<string>): ReadonlySet<string> {
  if (avoid.size === 0) return avoid
  const lonely = nodes.filter(node => partners(node, decodes, snapshot).every(decode => avoid.has(decode.id)))
  return new Set([...avoid, ...lonely.map(node => node.id)])
}

/** Prefill nodes that can take the request and have a partner, or why there are none. */
function prefillers ({ prefills, decodes }: Pools, request: RequestView, snapshot: RegistrySnapshot): { readonly nodes: readonly NodeSnapshot[], readonly why: string } {
  if (prefills.length === 0) return { nodes: [], why: 'no prefill node' }
  if (decodes.length === 0) return { nodes: [], why: 'no decode node' }
  const healthy = prefills.filter(node => usable(node, 'prefill'))
  if (healthy.length === 0) return { nodes: [], why: 'no healthy prefill node' }
  if (!decodes.some(node => usable(node, 'decode'))) return { nodes: [], why: 'no healthy decode node' }
  const paired = healthy.filter(node => partners(node, decodes, snapshot).length > 0)
  if (paired.length === 0) return { nodes: [], why: 'no decode node fits a prefill node' }
  const fitting = paired.filter(node => !tooLong(node, request.promptTokens ?? 0))
  if (fitting.length === 0) return { nodes: [], why: 'prompt too long for the prefill nodes' }
  const linked = fitting.filter(node => decodes.some(decode => usable(decode, 'decode') && snapshot.link(node.id, decode.id) === 'linked'))
  return { nodes: linked.length > 0 ? linked : fitting, why: '' }
}

/** Who may begin the request, the preferred first. Nobody: the reason. */
export function beginners (request: RequestView, pool: Pools, snapshot: RegistrySnapshot, options: PlanOptions): readonly Beginners[] | Refusal {
  const { disaggregate, disaggregateTokens } = options.routing
  const hybrids = pool.hybrids.filter(node => usable(node, 'decode'))
  const { nodes, why } = prefillers(pool, request, snapshot)
  const { singleNode } = request
  const whole = (reason: string): Beginners => ({ kind: 'whole', nodes: hybrids, reason })
  const divided = (reason: string): Beginners => ({ kind: 'divided', nodes, reason })
  const alone = (reason: string): Beginners => ({ kind: 'alone', nodes: request.media.length > 0 ? [] : pool.decodes.filter(node => node.info?.standalone === true && usable(node, 'decode')), reason })

  let order: Beginners[]
  if (disaggregate === 'never') order = [whole('disaggregation is off')]
  else if (singleNode !== undefined) order = singleNode.source === 'request' ? [whole(singleNode.what)] : [whole(singleNode.what), alone(singleNode.what)]
  else if (nodes.length === 0) order = [whole(why), alone(why)]
  else if (disaggregate === 'always') order = [divided('always'), whole('always')]
  else if (hybrids.length === 0) order = [divided(pool.hybrids.length === 0 ? 'no node does both' : 'no healthy node does both')]
  else if ((request.promptTokens ?? 0) >= disaggregateTokens) order = [divided('long prompt'), whole('long prompt')]
  else order = [whole('short prompt'), divided('short prompt')]
  const able = order.filter(one => one.nodes.length > 0)
  return able.length > 0 ? able : refusal(request, pool, options, why)
}

function refusal ({ singleNode, media }: RequestView, { hybrids, prefills, decodes }: Pools, options: PlanOptions, why: string): Refusal {
  const total = hybrids.length + prefills.length + decodes.length
  if (options.routing.disaggregate === 'never' && hybrids.length === 0) return { refused: 'EPD_ERR_NO_NODE', reason: 'disaggregation is off, and no node does both prefill and decode' }
  if (hybrids.length > 0) return { refused: 'EPD_ERR_NO_NODE', reason: why === '' ? `none of ${hybrids.length} nodes that do both is healthy` : `none of ${total} nodes can serve it (${why})` }
  if (singleNode?.source === 'request') return { refused: 'EPD_ERR_NO_HYBRID', reason: singleNode.what, param: singleNode.param }
  if (singleNode !== undefined) return { refused: 'EPD_ERR_NO_NODE', reason: `${singleNode.what}, and no node does both` }
  if (why.startsWith('prompt too long')) return { refused: 'EPD_ERR_NO_HYBRID', reason: 'a prompt this long', param: media.length > 0 ? 'messages' : undefined }
  return { refused: 'EPD_ERR_NO_NODE', reason: why }
}
