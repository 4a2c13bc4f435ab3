import { ROLE_TO_WIRE } from '../../adapters/adapter.ts'
import type { NodeStatus } from './api.ts'
import type { NodeRecord } from './node.ts'
import type { LinkState, LinkView, NodeSnapshot, RegistrySnapshot } from './types.ts'

/** Why a prefill node is of no use, when every link of it was refused. */
function refusals (record: NodeRecord, links: ReadonlyMap<string, LinkView>): string[] {
  const own = record.role === 'prefill' ? [...links.values()].filter(link => link.from === record.id) : []
  return own.every(link => link.state === 'refused') ? [...new Set(own.map(link => `not used by plans: ${link.reason}`))] : []
}

function nodeSnapshot (record: NodeRecord, links: ReadonlyMap<string, LinkView>): NodeSnapshot {
  const { models, adapter, load, breakers } = record
  const state = record.drained && record.state === 'healthy' ? 'draining' : record.state
  return Object.freeze({
    ...record.forAdapter(),
    models: Object.freeze([...models]),
    state,
    adapter,
    speed: record.options.speed ?? 1,
    drained: record.drained,
    checkMedia: record.options.checkMedia ?? record.info?.checkMedia ?? false,
    notes: Object.freeze([...record.notes, ...refusals(record, links)]),
    load,
    breakers,
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

/** Healthy, and an answer can come from it: a decode node needs a prefill node of the same model, unless it can do without. */
function answers ({ state, role, info, models }: NodeSnapshot, nodes: readonly NodeSnapshot[]): boolean {
  if (state !== 'healthy' || role === 'encoder' || role === 'prefill') return false
  if (role === 'hybrid' || info?.standalone === true) return true
  return nodes.some(other => other.role === 'prefill' && other.state === 'healthy' && other.models.some(model => models.includes(model)))
}

/** The registry as plain frozen data. Built once per change, not per request. */
export function buildSnapshot (version: number, records: Iterable<NodeRecord>, views: readonly LinkView[]): RegistrySnapshot {
  const ends = byEnd(views)
  const nodes: NodeSnapshot[] = []
  const byId = new Map<string, NodeSnapshot>()
  const models = new Set<string>()
  for (const record of records) {
    const node = nodeSnapshot(record, ends.get(record.id) ?? new Map())
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
export function statusOf (node: NodeSnapshot, record: NodeRecord): NodeStatus {
  const { options, load } = record
  const { encode, prefill, decode } = node.breakers
  return {
    role: ROLE_TO_WIRE[node.role],
    models: node.models,
    unfinished: node.load.requests,
    latency: load.latencies,
    speed: options.speed ?? null,
    health: node.state,
    source: sourceOf(record),
    adapter: node.adapter.name,
    backend: node.info?.backend ?? null,
    epoch: node.info?.epoch ?? null,
    vision: node.info?.vision ?? null,
    produces: node.info?.produces ?? [],
    accepts: node.info?.accepts ?? [],
    fingerprint: node.info?.fingerprint ?? null,
    standalone: node.info?.standalone ?? false,
    vision_tokens: node.load.tokens,
    vision_rate: node.load.rate === undefined ? null : Math.round(node.load.rate),
    notes: node.notes,
    breakers: { encode, prefill, decode },
    links: Object.fromEntries([...node.links].map(([other, { state, reason, link }]) => [other, { state, ...(reason === undefined ? {} : { reason }), ...(link === undefined ? {} : { transport: link.transport }) }]))
  }
}

export function sourceOf ({ options: { configured, discovered, transient } }: NodeRecord): string {
  return configured === true ? 'configuration' : discovered ?? (transient === true ? 'embedded' : 'registration')
}
