/** Where the nodes that are examined come from: a configuration, whose nodes are asked from here, or a running gateway. */
import { Agent } from 'undici'
import type { Adapter, Role } from '../../../adapters/adapter.ts'
import { adapters } from '../../../adapters/index.ts'
import { resolveOptions, type EpdOptions } from '../../options/index.ts'
import { Registry } from '../../registry/index.ts'
import type { GatewayAddress } from '../gateway-client.ts'
import { nodesOf } from '../node-status.ts'
import type { Patient } from './diagnosis.ts'

const SILENT = { debug () {}, info () {}, warn () {}, error () {} }
/** Each node is asked twice: one failure may be chance. */
const PATIENCE_MS = 20_000

/** Asks each node of a configuration, as a gateway would, but makes no links: engines change by those. */
export async function patientsOfConfig (options: EpdOptions, onProgress: (asked: number, of: number) => void): Promise<Patient[]> {
  const { nodes, timeouts, adapters: own } = resolveOptions(options)
  const dispatcher = new Agent({ connect: { timeout: timeouts.connect } })
  const registry = new Registry({ dispatcher, log: SILENT, adapters: [...own, ...adapters.values()].map(withoutLinks), probeTimeout: timeouts.probe })
  try {
    for (const node of nodes) registry.add(node, { configured: true })
    const asked = (): number => registry.snapshot().nodes.filter(({ state }) => state !== 'unknown').length
    await registry.waitFor(() => {
      onProgress(asked(), nodes.length)
      return asked() === nodes.length
    }, { signal: AbortSignal.timeout(PATIENCE_MS) }).catch(() => {})
    return registry.snapshot().nodes.map(({ id, role, adapter, models, state, notes, info }) => ({ id, role, adapter: adapter.name, models, state, notes, info, resting: [], links: new Map() }))
  } finally {
    await registry.close()
    await dispatcher.destroy()
  }
}

function withoutLinks (adapter: Adapter): Adapter {
  return {
    ...adapter,
    link: async (a, b) => ({ from: a.id, to: b.id, transport: 'none', epochs: [a.info?.epoch, b.info?.epoch] }),
    unlink: async () => {}
  }
}

/** The nodes as a running gateway sees them, links included. */
export async function patientsOfGateway (gateway: GatewayAddress): Promise<Patient[]> {
  return (await nodesOf(gateway)).map(({ url, role, adapter, models, health, notes, backend, epoch, vision, produces, accepts, fingerprint, standalone, breakers, links }) => ({
    id: url,
    role: role as Role,
    adapter,
    models,
    state: health,
    notes,
    info: backend === null
      ? undefined
      : { status: 'healthy', models, role: role as Role, backend, produces: produces ?? [], accepts: accepts ?? [], vision: vision ?? 'none', standalone, epoch: epoch ?? undefined, fingerprint: fingerprint ?? undefined },
    resting: Object.entries(breakers).flatMap(([stage, state]) => state === 'closed' ? [] : [`${stage} ${state}`]),
    links: new Map(Object.entries(links))
  }))
}
