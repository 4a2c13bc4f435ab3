import type { Role } from '../../adapters/adapter.ts'
import { remembered, type NodeSnapshot } from '../registry/index.ts'
import type { Nodes, Pool } from './types.ts'

export const NO_POOL: Pool = { hybrids: [], prefills: [], decodes: [], encoders: [] }
const PLACE = { hybrid: 'hybrids', prefill: 'prefills', decode: 'decodes', encoder: 'encoders' } as const satisfies Record<Role, keyof Pool>

/** The nodes of each model, by role: the same lists until the nodes change. */
export const poolsOf = remembered((nodes: Nodes) => {
  const pools = new Map<string, Record<keyof Pool, NodeSnapshot[]>>()
  for (const node of nodes) {
    for (const model of new Set(node.models)) {
      let pool = pools.get(model)
      if (pool === undefined) pools.set(model, pool = { hybrids: [], prefills: [], decodes: [], encoders: [] })
      pool[PLACE[node.role]].push(node)
    }
  }
  return pools
})
