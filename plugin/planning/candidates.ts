import type { NodeSnapshot, RegistrySnapshot } from '../registry/index.ts'

const FEATURES = 'features:'
const NOBODY: ReadonlySet<string> = new Set()

/** Healthy, and its breaker lets calls of this stage through. */
export function usable (node: NodeSnapshot, stage: 'encode' | 'decode'): boolean {
  return node.state === 'healthy' && node.breakers[stage] !== 'open'
}

export function serves (node: NodeSnapshot, model: string): boolean {
  return node.models.includes(model)
}

const generatorsOf = new WeakMap<RegistrySnapshot, Map<string, readonly NodeSnapshot[]>>()

/** Nodes that can generate. Prefill and decode nodes alone can not. Looked for once per snapshot. */
export function generators (snapshot: RegistrySnapshot, model: string): readonly NodeSnapshot[] {
  let byModel = generatorsOf.get(snapshot)
  if (byModel === undefined) generatorsOf.set(snapshot, byModel = new Map())
  let nodes = byModel.get(model)
  if (nodes === undefined) {
    nodes = snapshot.nodes.filter(node => node.role === 'hybrid' && serves(node, model))
    // A client's own invention is not worth remembering.
    if (nodes.length > 0) byModel.set(model, nodes)
  }
  return nodes
}

export function encoders (snapshot: RegistrySnapshot, model: string): NodeSnapshot[] {
  return snapshot.nodes.filter(node => node.role === 'encoder' && serves(node, model))
}

/** Can features flow from `encoder` to `consumer`? By what both say of themselves, and by what linking them has shown. */
export function pairs (encoder: NodeSnapshot, consumer: NodeSnapshot, snapshot: RegistrySnapshot): boolean {
  const from = encoder.info
  const to = consumer.info
  if (from === undefined || to === undefined) return false
  if (!from.produces.some(format => format.startsWith(FEATURES) && to.accepts.includes(format))) return false
  if (from.fingerprint !== undefined && to.fingerprint !== undefined && from.fingerprint !== to.fingerprint) return false
  const link = snapshot.link(encoder.id, consumer.id)
  return link !== 'refused' && link !== 'none'
}

/**
 * The node with the fewest requests in flight for its speed, then the fewest vision tokens, then the earliest.
 * Nodes to avoid are taken only when there is nothing else.
 */
export function leastLoaded (nodes: readonly NodeSnapshot[], avoid: ReadonlySet<string> = NOBODY): NodeSnapshot | undefined {
  let best: NodeSnapshot | undefined
  for (const node of nodes) {
    if (best === undefined || lighter(node, best, avoid)) best = node
  }
  return best
}

function lighter (a: NodeSnapshot, b: NodeSnapshot, avoid: ReadonlySet<string>): boolean {
  if (avoid.size > 0 && avoid.has(a.id) !== avoid.has(b.id)) return avoid.has(b.id)
  const requests = (a.load.requests + 1) / a.speed - (b.load.requests + 1) / b.speed
  return requests !== 0 ? requests < 0 : a.load.tokens / a.speed < b.load.tokens / b.speed
}
