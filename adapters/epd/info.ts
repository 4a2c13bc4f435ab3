import { ROLE_FROM_WIRE, type AdapterNode, type NodeInfo, type Role } from '../adapter.ts'
import type { EngineInfoAnswered, ServerDetails } from '../probes.ts'

/** NodeInfo of one of our engines, from its own engine_info. `models`: the names of GET /v1/models. */
export function infoOfEpd (node: AdapterNode, info: EngineInfoAnswered, status: NodeInfo['status'], models: readonly string[]): NodeInfo {
  const role: Role = ROLE_FROM_WIRE[info.role ?? 0] ?? node.role
  const vision = info.vision === 'full' || info.vision === 'features' ? info.vision : 'none'
  return {
    status,
    models: models.length > 0 || info.model === undefined ? models : [info.model],
    role,
    backend: `fastify-epd/${info.version ?? '?'} ${info.backend ?? 'pytorch'}`,
    version: info.version,
    epoch: info.epoch,
    fingerprint: info.fingerprint,
    produces: info.produces ?? [],
    accepts: info.accepts ?? [],
    vision: node.vision ?? vision,
    maxPrefillTokens: node.maxPrefillTokens,
    standalone: role === 'decode' ? true : undefined,
    notes: role === node.role ? [] : [`registered as ${node.role}, says it is ${role}: taken as ${role}`],
    details: { server: 'epd', engine: info } satisfies ServerDetails
  }
}
