import type { NodeSnapshot, RegistrySnapshot } from '../registry/index.ts'
import { encoders, leastLoaded, pairs, pools, serves, usable, type Pools } from './candidates.ts'
import { beginners, decodeFor, shunned, type Beginners } from './division.ts'
import { place, saturated } from './placement.ts'
import type { RequestView } from './request.ts'
import type { Plan, PlanOptions, Refusal, Topology } from './types.ts'

const NOBODY: ReadonlySet<string> = new Set()

/**
 * Decides which nodes serve a request, and says why. A pure function: the same arguments give the same plan.
 *
 * @param avoid nodes that have failed this request already; taken only when there is nothing else
 */
export function planRequest (request: RequestView, snapshot: RegistrySnapshot, options: PlanOptions, avoid: ReadonlySet<string> = NOBODY): Plan | Refusal {
  const pool = pools(snapshot, request.model)
  const { hybrids } = pool
  if (pool.prefills.length > 0 || pool.decodes.length > 0) return planApart(request, pool, snapshot, options, avoid)
  if (hybrids.length === 0) return unknownModel(snapshot, request.model)
  const ready = allUsable(hybrids) ? hybrids : hybrids.filter(node => usable(node, 'decode'))
  if (ready.length === 0) return { refused: 'EPD_ERR_NO_NODE', reason: `none of ${hybrids.length} nodes is healthy` }
  const begun = begin(request, ready, snapshot, options, avoid)
  return 'refused' in begun ? begun : planOf(begun, begun.encodes ? 'e-pd' : request.media.length === 0 ? 'pd' : 'hybrid', begun.reason, begun.node)
}

/** As nearly always: no copy is needed then. */
function allUsable (nodes: readonly NodeSnapshot[]): boolean {
  for (let i = 0; i < nodes.length; i++) if (!usable(nodes[i]!, 'decode')) return false
  return true
}

function preferSeeing (nodes: readonly NodeSnapshot[]): readonly NodeSnapshot[] {
  const seeing = nodes.filter(node => node.info?.vision === 'full')
  return seeing.length > 0 ? seeing : nodes
}

function unknownModel (snapshot: RegistrySnapshot, model: string): Refusal {
  const { nodes } = snapshot
  if (nodes.length === 0) return { refused: 'EPD_ERR_NO_NODE', reason: 'no node is registered' }
  // Encoders alone can't answer, but they show that the model is meant to be here.
  if (nodes.some(node => serves(node, model))) return { refused: 'EPD_ERR_NO_NODE', reason: 'no node of this model generates' }
  if (nodes.some(node => node.models.length === 0)) return { refused: 'EPD_ERR_NO_NODE', reason: 'nodes are starting' }
  return { refused: 'EPD_ERR_MODEL_NOT_FOUND', reason: 'no node serves this model' }
}

/** With prefill or decode nodes about: the first of the possible ways that needs no node which has failed this request, else the first. */
function planApart (request: RequestView, pool: Pools, snapshot: RegistrySnapshot, options: PlanOptions, avoid: ReadonlySet<string>): Plan | Refusal {
  const ways = beginners(request, pool, snapshot, options)
  if ('refused' in ways) return ways
  let first: Plan | undefined
  let refusal: Refusal | undefined
  for (const way of ways) {
    const found = planWay(way, request, pool, snapshot, options, avoid)
    if ('refused' in found) {
      refusal ??= found
      continue
    }
    first ??= found
    if (avoid.size === 0 || !(avoid.has(found.node.id) || (found.prefill !== undefined && avoid.has(found.prefill.id)))) return found
  }
  return first ?? refusal!
}

const TOPOLOGIES: Readonly<Record<Beginners['kind'], readonly [text: Topology, encodesItself: Topology, encodesApart: Topology]>> = {
  whole: ['pd', 'hybrid', 'e-pd'],
  divided: ['p-d', 'p-d', 'e-p-d'],
  alone: ['pd', 'hybrid', 'e-pd']
}

function planWay ({ kind, nodes, reason: why }: Beginners, request: RequestView, pool: Pools, snapshot: RegistrySnapshot, options: PlanOptions, avoid: ReadonlySet<string>): Plan | Refusal {
  const divided = kind === 'divided'
  const begun = begin(request, nodes, snapshot, options, divided ? shunned(nodes, pool, snapshot, avoid) : avoid, divided)
  if ('refused' in begun) return begun
  const topology = TOPOLOGIES[kind][begun.encodes ? 2 : request.media.length > 0 ? 1 : 0]
  const reason = divided && request.media.length === 0 ? why : `${begun.reason}, ${why}`
  return divided
    ? { ...planOf(begun, topology, reason, decodeFor(begun.node, pool, snapshot, avoid)), prefill: begun.node }
    : planOf(begun, topology, reason, begun.node)
}

function planOf ({ fallback, order }: Begun, topology: Topology, reason: string, node: NodeSnapshot): Plan {
  return { topology, reason, node, fallback, order }
}

/** The node that begins a request, PD or P, and who encodes for it. */
interface Begun extends Pick<Plan, 'reason' | 'node' | 'fallback' | 'order'> {
  readonly encodes: boolean
}

/** @param byTokens choose by the tokens in flight rather than by the requests */
function begin (request: RequestView, ready: readonly NodeSnapshot[], snapshot: RegistrySnapshot, options: PlanOptions, avoid: ReadonlySet<string>, byTokens = false): Begun | Refusal {
  if (request.media.length > 0) return beginMedia(request, ready, snapshot, options, avoid, byTokens)
  const node = leastLoaded(request.opaque === true ? preferSeeing(ready) : ready, avoid, byTokens)!
  return { reason: 'text only', node, fallback: false, order: [], encodes: false }
}

function beginMedia (request: RequestView, ready: readonly NodeSnapshot[], snapshot: RegistrySnapshot, options: PlanOptions, avoid: ReadonlySet<string>, byTokens: boolean): Begun | Refusal {
  const { model, media } = request
  const { encoderTokens, smallItem } = options.routing
  const known = encoders(snapshot, model)
  const healthy = known.filter(node => usable(node, 'encode'))
  const seeing = ready.filter(node => node.info?.vision === 'full')
  const paired = ready.filter(node => healthy.some(encoder => pairs(encoder, node, snapshot)))
  const itself = (reason: string): Begun | undefined => {
    const node = leastLoaded(seeing, avoid, byTokens)
    return node && { reason, node, fallback: false, order: [], encodes: false }
  }

  if (paired.length === 0) {
    const why = known.length === 0 ? 'no encoder' : healthy.length === 0 ? 'no healthy encoder' : 'no encoder fits the node'
    return itself(why) ?? { refused: 'EPD_ERR_NO_ENCODER', reason: why }
  }
  if (options.bypass === 'auto' && seeing.length > 0) {
    if (media.every(item => item.tokens <= smallItem)) return itself('small items')!
    if (saturated(healthy, encoderTokens)) return itself('encoders saturated')!
  }
  // The language model is chosen before the encoders, because some transports push to it.
  const node = leastLoaded(preferLinked(paired, healthy, snapshot), avoid, byTokens)!
  const order = place(media, linkable(healthy, node, snapshot), encoderTokens, avoid)
  return { reason: reasonOf(order), node, fallback: node.info?.vision === 'full', order, encodes: true }
}

/** A pair whose handshake is under way may have failed many times before: who is linked comes first, whatever the load. */
function preferLinked (nodes: readonly NodeSnapshot[], encoders: readonly NodeSnapshot[], snapshot: RegistrySnapshot): readonly NodeSnapshot[] {
  const linked = nodes.filter(node => encoders.some(encoder => snapshot.link(encoder.id, node.id) === 'linked'))
  return linked.length > 0 ? linked : nodes
}

/** Encoders that fit the node: those linked to it, else those that may soon be, else those that could not be linked lately. */
function linkable (encoders: readonly NodeSnapshot[], node: NodeSnapshot, snapshot: RegistrySnapshot): readonly NodeSnapshot[] {
  const fitting = encoders.filter(encoder => pairs(encoder, node, snapshot))
  const linked = fitting.filter(encoder => snapshot.link(encoder.id, node.id) === 'linked')
  if (linked.length > 0) return linked
  const sound = fitting.filter(encoder => snapshot.link(encoder.id, node.id) !== 'failed')
  return sound.length > 0 ? sound : fitting
}

function reasonOf (order: ReadonlyArray<readonly NodeSnapshot[]>): string {
  const used = new Set(order.map(nodes => nodes[0]!.id)).size
  return `${order.length} ${order.length === 1 ? 'item' : 'items'} on ${used} ${used === 1 ? 'encoder' : 'encoders'}`
}
