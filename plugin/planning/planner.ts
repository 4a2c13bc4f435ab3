import type { NodeSnapshot, RegistrySnapshot } from '../registry/index.ts'
import { encoders, generators, leastLoaded, pairs, serves, usable } from './candidates.ts'
import { place, saturated } from './placement.ts'
import type { Plan, PlanOptions, Refusal, RequestView } from './types.ts'

const NOBODY: ReadonlySet<string> = new Set()

/**
 * Decides which nodes serve a request, and says why. A pure function: the same arguments give the same plan.
 *
 * @param avoid nodes that have failed this request already; taken only when there is nothing else
 */
export function planRequest (request: RequestView, snapshot: RegistrySnapshot, options: PlanOptions, avoid: ReadonlySet<string> = NOBODY): Plan | Refusal {
  const { model, media } = request
  const known = generators(snapshot, model)
  if (known.length === 0) return unknownModel(snapshot, model)
  const ready = allUsable(known) ? known : known.filter(node => usable(node, 'decode'))
  if (ready.length === 0) return { refused: 'EPD_ERR_NO_NODE', reason: `none of ${known.length} nodes is healthy` }
  if (media.length === 0) {
    return { topology: 'pd', reason: 'text only', node: leastLoaded(request.opaque === true ? preferSeeing(ready) : ready, avoid)!, fallback: false, order: [] }
  }
  return planMedia(request, snapshot, options, avoid, ready)
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

function planMedia (request: RequestView, snapshot: RegistrySnapshot, options: PlanOptions, avoid: ReadonlySet<string>, ready: readonly NodeSnapshot[]): Plan | Refusal {
  const { model, media } = request
  const { encoderTokens, smallItem } = options.routing
  const known = encoders(snapshot, model)
  const healthy = known.filter(node => usable(node, 'encode'))
  const seeing = ready.filter(node => node.info?.vision === 'full')
  const paired = ready.filter(node => healthy.some(encoder => pairs(encoder, node, snapshot)))

  if (paired.length === 0) {
    const why = known.length === 0 ? 'no encoder' : healthy.length === 0 ? 'no healthy encoder' : 'no encoder fits the node'
    return hybrid(seeing, avoid, why) ?? { refused: 'EPD_ERR_NO_ENCODER', reason: why }
  }
  if (options.bypass === 'auto' && seeing.length > 0) {
    if (media.every(item => item.tokens <= smallItem)) return hybrid(seeing, avoid, 'small items')!
    if (saturated(healthy, encoderTokens)) return hybrid(seeing, avoid, 'encoders saturated')!
  }
  // The language model is chosen before the encoders, because some transports push to it.
  const node = leastLoaded(preferLinked(paired, healthy, snapshot), avoid)!
  const order = place(media, linkable(healthy, node, snapshot), encoderTokens, avoid)
  return { topology: 'e-pd', reason: reasonOf(order), node, fallback: node.info?.vision === 'full', order }
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

function hybrid (seeing: readonly NodeSnapshot[], avoid: ReadonlySet<string>, reason: string): Plan | undefined {
  const node = leastLoaded(seeing, avoid)
  return node && { topology: 'hybrid', reason, node, fallback: false, order: [] }
}

function reasonOf (order: ReadonlyArray<readonly NodeSnapshot[]>): string {
  const used = new Set(order.map(nodes => nodes[0]!.id)).size
  return `${order.length} ${order.length === 1 ? 'item' : 'items'} on ${used} ${used === 1 ? 'encoder' : 'encoders'}`
}
