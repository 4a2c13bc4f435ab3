import type { NodeSnapshot, RegistrySnapshot } from '../registry/index.ts'

const NOBODY: ReadonlySet<string> = new Set()

/** Healthy, and its breaker lets calls of this stage through. */
export function usable (node: NodeSnapshot, stage: 'encode' | 'prefill' | 'decode'): boolean {
  return node.state === 'healthy' && node.breakers[stage] !== 'open'
}

export function serves (node: NodeSnapshot, model: string): boolean {
  return node.models.includes(model)
}

/** The nodes of a model that generate, alone or two by two. */
export interface Pools {
  readonly hybrids: readonly NodeSnapshot[]
  readonly prefills: readonly NodeSnapshot[]
  readonly decodes: readonly NodeSnapshot[]
}

const poolsOf = new WeakMap<RegistrySnapshot, Map<string, Pools>>()

/** Looked for once per snapshot. */
export function pools (snapshot: RegistrySnapshot, model: string): Pools {
  let byModel = poolsOf.get(snapshot)
  if (byModel === undefined) poolsOf.set(snapshot, byModel = new Map())
  let found = byModel.get(model)
  if (found === undefined) {
    const nodes = snapshot.nodes.filter(node => serves(node, model))
    const of = (role: NodeSnapshot['role']): NodeSnapshot[] => nodes.filter(node => node.role === role)
    found = { hybrids: of('hybrid'), prefills: of('prefill'), decodes: of('decode') }
    // A client's own invention is not worth remembering.
    if (nodes.length > 0) byModel.set(model, found)
  }
  return found
}

export function encoders (snapshot: RegistrySnapshot, model: string): NodeSnapshot[] {
  return snapshot.nodes.filter(node => node.role === 'encoder' && serves(node, model))
}

/** Can features, or KV blocks, flow from one to the other? By what both say of themselves, and by what linking them has shown. */
export function pairs (from: NodeSnapshot, to: NodeSnapshot, snapshot: RegistrySnapshot, kind: 'features:' | 'kv:' = 'features:'): boolean {
  const [one, other] = [from.info, to.info]
  if (one === undefined || other === undefined) return false
  if (!one.produces.some(format => format.startsWith(kind) && other.accepts.includes(format))) return false
  if (one.fingerprint !== undefined && other.fingerprint !== undefined && one.fingerprint !== other.fingerprint) return false
  const link = snapshot.link(from.id, to.id)
  return link !== 'refused' && link !== 'none'
}

/**
 * The node with the fewest requests in flight for its speed, then the fewest tokens, then the earliest. `byTokens`: the
 * tokens first, as a long prompt keeps a prefill node busier than many short ones. Nodes to avoid are taken only when
 * there is nothing else.
 */
export function leastLoaded (nodes: readonly NodeSnapshot[], avoid: ReadonlySet<string> = NOBODY, byTokens = false): NodeSnapshot | undefined {
  let best: NodeSnapshot | undefined
  for (const node of nodes) {
    if (best === undefined || lighter(node, best, avoid, byTokens)) best = node
  }
  return best
}

function lighter (a: NodeSnapshot, b: NodeSnapshot, avoid: ReadonlySet<string>, byTokens: boolean): boolean {
  if (avoid.size > 0 && avoid.has(a.id) !== avoid.has(b.id)) return avoid.has(b.id)
  const requests = (a.load.requests + 1) / a.speed - (b.load.requests + 1) / b.speed
  const tokens = a.load.tokens / a.speed - b.load.tokens / b.speed
  const [first, second] = byTokens ? [tokens, requests] : [requests, tokens]
  return first !== 0 ? first < 0 : second < 0
}
