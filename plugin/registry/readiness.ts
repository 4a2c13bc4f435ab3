/** Which models a request would find a node for, and for the others why not. For probes and people; no node is named. */
import type { Role } from '../../adapters/adapter.ts'
import type { NodeSnapshot, NodeState, RegistrySnapshot } from './types.ts'

export interface RoleReadiness {
  readonly healthy: number
  readonly total: number
  /** Why not all of them take requests. */
  readonly why?: string
}

export interface ModelReadiness {
  readonly ready: boolean
  readonly why?: string
  readonly roles: Readonly<Partial<Record<Role, RoleReadiness>>>
}

export interface Readiness {
  readonly ready: boolean
  readonly why?: string
  readonly models: Readonly<Record<string, ModelReadiness>>
}

const ROLES: readonly Role[] = ['encoder', 'prefill', 'decode', 'hybrid']
const WORDS: Readonly<Record<NodeState, string>> = {
  unknown: 'not probed yet',
  unhealthy: 'unhealthy',
  initialising: 'starting',
  sleeping: 'sleeping',
  draining: 'draining',
  healthy: 'healthy'
}

/**
 * @param only a model that must be ready; without it one ready model is enough, as at `/health`
 * @param none why there are no nodes
 */
export function readinessOf ({ nodes, models }: RegistrySnapshot, only?: string, none = 'no node is registered'): Readiness {
  const names = new Set([...models, ...nodes.flatMap(node => node.models)])
  const byModel = Object.fromEntries([...names].map(name => [name, modelReadiness(name, models.includes(name), nodes.filter(node => node.models.includes(name)))]))
  if (only !== undefined) {
    const one = Object.hasOwn(byModel, only) ? byModel[only] : undefined
    return one === undefined ? { ready: false, why: 'no node serves this model', models: {} } : { ...pick(one), models: { [only]: one } }
  }
  // A hybrid node that lists no models passes everything on.
  const ready = models.length > 0 || nodes.some(node => node.role === 'hybrid' && node.state === 'healthy')
  return { ready, ...(ready ? {} : { why: nodes.length === 0 ? none : names.size === 0 ? `no node has a model: ${countStates(nodes)}` : 'no model has the nodes that it needs' }), models: byModel }
}

function pick ({ ready, why }: ModelReadiness): { ready: boolean, why?: string } {
  return why === undefined ? { ready } : { ready, why }
}

function modelReadiness (model: string, ready: boolean, nodes: readonly NodeSnapshot[]): ModelReadiness {
  const roles = Object.fromEntries(ROLES.map(role => [role, nodes.filter(node => node.role === role)] as const)
    .filter(([, ofRole]) => ofRole.length > 0).map(([role, ofRole]) => [role, roleReadiness(ofRole)]))
  return { ready, ...(ready ? {} : { why: whyNot(nodes) }), roles }
}

function roleReadiness (nodes: readonly NodeSnapshot[]): RoleReadiness {
  const healthy = nodes.filter(node => node.state === 'healthy')
  const resting = healthy.filter(({ breakers: { encode, prefill, decode } }) => [encode, prefill, decode].includes('open')).length
  const reasons = [...(healthy.length === nodes.length ? [] : [countStates(nodes)]), ...(resting === 0 ? [] : [`${resting} rest after failures`])]
  return { healthy: healthy.length, total: nodes.length, ...(reasons.length === 0 ? {} : { why: reasons.join('; ') }) }
}

function whyNot (nodes: readonly NodeSnapshot[]): string {
  const has = (role: Role): boolean => nodes.some(node => node.role === role)
  const healthy = (role: Role): boolean => nodes.some(node => node.role === role && node.state === 'healthy')
  if (!has('hybrid') && !has('decode')) return 'no node of this model generates'
  if (healthy('decode')) return has('prefill') ? 'no prefill node is healthy' : 'its decode nodes have no prefill node'
  if (!has('decode')) return 'no hybrid node is healthy'
  return has('hybrid') ? 'no hybrid and no decode node is healthy' : 'no decode node is healthy'
}

/** `1 unhealthy, 2 not probed yet` */
function countStates (nodes: readonly NodeSnapshot[]): string {
  const counts = new Map<string, number>()
  for (const { state } of nodes) if (state !== 'healthy') counts.set(WORDS[state], (counts.get(WORDS[state]) ?? 0) + 1)
  return [...counts].map(([word, count]) => `${count} ${word}`).join(', ')
}
