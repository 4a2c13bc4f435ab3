/** The nodes of a running gateway, read from its answers. */
import { ROLE_FROM_WIRE } from '../../adapters/adapter.ts'
import type { NodeStatus } from '../registry/api.ts'
import type { TraceSummary } from '../traces/summary.ts'
import { misfit, NODES } from './answer-shapes.ts'
import { askJson, type GatewayAddress } from './gateway-client.ts'
import { read } from './trace-source.ts'

export interface NodeRow extends Omit<NodeStatus, 'role'> {
  readonly url: string
  readonly role: string
}

/** Traces in which errors of nodes are looked for. */
const RECENT = 200

/** @throws Error when it is not this project's gateway */
export async function nodesOf (gateway: GatewayAddress): Promise<NodeRow[]> {
  const status = await askJson(gateway, '/nodes/status')
  const wrong = misfit(NODES, status)
  if (wrong !== undefined) throw new Error(`${gateway.url} is not a fastify-epd gateway, or of another version (/nodes/status${wrong})`)
  const entries = Object.entries(status as Record<string, NodeStatus>)
  return entries.map(([url, node]) => ({ ...node, url, role: ROLE_FROM_WIRE[node.role] ?? String(node.role) }))
}

/** What each node's last failed call said, where the gateway keeps traces. */
export async function lastErrors (gateway: GatewayAddress): Promise<Map<string, string>> {
  const errors = new Map<string, string>()
  const { traces = [] } = await read<{ traces: TraceSummary[] }>(gateway, `/epd/traces?limit=${RECENT}`).catch(() => undefined) ?? {}
  // Newest first; within a trace the last failure is the newest.
  for (const { failures = [], start } of traces) {
    for (const { node, code, message } of failures.toReversed()) {
      // What the node refused was the request's fault.
      if (node !== undefined && code !== 'REJECTED' && !errors.has(node)) errors.set(node, `${code}: ${message} (${ago(Date.now() - Date.parse(start))})`)
    }
  }
  return errors
}

/** Stages whose breaker is not closed. */
export function breakersOf ({ breakers }: Pick<NodeRow, 'breakers'>): string {
  const open = Object.entries(breakers).filter(([, state]) => state !== 'closed')
  return open.length === 0 ? 'closed' : open.map(([stage, state]) => `${stage} ${state}`).join(', ')
}

/** The first two, and how many more. */
export function modelsOf ({ models }: Pick<NodeRow, 'models'>): string {
  return models.length === 0 ? '-' : models.slice(0, 2).join(', ') + (models.length > 2 ? ` +${models.length - 2}` : '')
}

function ago (ms: number): string {
  const seconds = Math.max(0, Math.round(ms / 1_000))
  return seconds < 120 ? `${seconds} s ago` : seconds < 7_200 ? `${Math.round(seconds / 60)} min ago` : `${Math.round(seconds / 3_600)} h ago`
}
