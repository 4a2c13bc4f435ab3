import { ROLE_TO_WIRE, type Stage } from '../../adapters/adapter.ts'
import type { Entry } from './entry.ts'
import type { LinkState, LinkView, NodeSnapshot, NodeStatus, RegistrySnapshot } from './types.ts'

/** Why a prefill node is of no use, when every link of it was refused. */
function refusals (entry: Entry, links: ReadonlyMap<string, LinkView>): string[] {
  const own = entry.role === 'prefill' ? [...links.values()].filter(link => link.from === entry.id) : []
  return own.every(link => link.state === 'refused') ? [...new Set(own.map(link => `not used by plans: ${link.reason}`))] : []
}

function nodeSnapshot (entry: Entry, links: ReadonlyMap<string, LinkView>): NodeSnapshot {
  return Object.freeze({
    id: entry.id,
    role: entry.role,
    models: Object.freeze([...entry.models]),
    state: entry.state,
    node: entry.node,
    adapter: entry.adapter,
    info: entry.info,
    speed: entry.spec.speed ?? 1,
    notes: Object.freeze([...entry.notes, ...refusals(entry, links)]),
    load: entry.load,
    breakers: entry.breakers,
    links
  })
}

/** Pairs by each of their ends. */
function byEnd (views: readonly LinkView[]): Map<string, Map<string, LinkView>> {
  const ends = new Map<string, Map<string, LinkView>>()
  const put = (end: string, other: string, view: LinkView): void => {
    let map = ends.get(end)
    if (map === undefined) ends.set(end, map = new Map())
    map.set(other, view)
  }
  for (const view of views) {
    put(view.from, view.to, view)
    put(view.to, view.from, view)
  }
  return ends
}

/** Healthy, and its breaker lets calls of this stage through. */
export function usable (node: NodeSnapshot, stage: Stage): boolean {
  return node.state === 'healthy' && node.breakers[stage] !== 'open'
}

/** Healthy, and an answer can come from it: a decode node needs a prefill node of the same model, unless it can do without. */
function answers ({ state, role, info, models }: NodeSnapshot, nodes: readonly NodeSnapshot[]): boolean {
  if (state !== 'healthy' || role === 'encoder' || role === 'prefill') return false
  if (role === 'hybrid' || info?.standalone === true) return true
  return nodes.some(other => other.role === 'prefill' && other.state === 'healthy' && other.models.some(model => models.includes(model)))
}

/** The registry as plain frozen data. Built once per change, not per request. */
export function buildSnapshot (version: number, entries: Iterable<Entry>, views: readonly LinkView[]): RegistrySnapshot {
  const ends = byEnd(views)
  const nodes: NodeSnapshot[] = []
  const byId = new Map<string, NodeSnapshot>()
  const models = new Set<string>()
  for (const entry of entries) {
    const node = nodeSnapshot(entry, ends.get(entry.id) ?? new Map())
    nodes.push(node)
    byId.set(node.id, node)
  }
  for (const node of nodes) if (answers(node, nodes)) for (const model of node.models) models.add(model)
  return Object.freeze({
    version,
    nodes: Object.freeze(nodes),
    byId,
    models: Object.freeze([...models]),
    link: (from: string, to: string): LinkState => {
      const view = byId.get(from)?.links.get(to)
      return view?.from === from ? view.state : 'none'
    }
  })
}

/** GET /nodes/status: LMDeploy's fields first, then what its tools ignore. */
export function statusOf (node: NodeSnapshot, speed: number | undefined, latencies: readonly number[]): NodeStatus {
  const { encode, migrate, prefill, decode } = node.breakers
  return {
    role: ROLE_TO_WIRE[node.role],
    models: node.models,
    unfinished: node.load.requests,
    latency: latencies,
    speed: speed ?? null,
    health: node.state,
    adapter: node.adapter.name,
    backend: node.info?.backend ?? null,
    epoch: node.info?.epoch ?? null,
    vision_tokens: node.load.tokens,
    notes: node.notes,
    breakers: { encode, migrate, prefill, decode },
    links: Object.fromEntries([...node.links].map(([other, { state, reason }]) => [other, { state, ...(reason === undefined ? {} : { reason }) }]))
  }
}
