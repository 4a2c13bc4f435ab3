import { setMaxListeners } from 'node:events'
import type { Adapter, AdapterNode, Call, LeaseRef, NodeInfo } from '../adapter.ts'
import { requestOk } from '../http.ts'
import { engineInfo, health, infoOfLmdeploy, infoOfOurs, infoOfStarting, isOurNode, isOurs, models } from '../lmdeploy.ts'
import { abort } from './abort.ts'
import { encode } from './encode.ts'
import { generate } from './generate.ts'
import { link, unlink } from './link.ts'
import { prefill } from './prefill.ts'

async function probe (node: AdapterNode, call: Call): Promise<NodeInfo> {
  const status = await health(node, call)
  if (status === 'initialising') return infoOfStarting(node)
  const [list, answer] = await Promise.all([models(node, call), engineInfo(node, call)])
  if (answer.kind === 'info' && isOurs(answer.info)) {
    const info = infoOfOurs(answer.info, status, list.ids, node)
    return answer.info.backend === 'turbomind' ? { ...info, produces: [], accepts: [], notes: [...info.notes ?? [], 'runs a TurboMind engine: name the adapter turbomind'] } : info
  }
  const notes = {
    info: [],
    turbomind: ['/distserve/engine_info answers 500, as a TurboMind engine does: name the adapter turbomind'],
    absent: ['has no /distserve: too old for disaggregation']
  }[answer.kind]
  return await infoOfLmdeploy(node, 'pytorch', status, list.ids, answer.kind === 'info' ? answer.info : undefined, notes, call)
}

/** Of features and of KV blocks. Also right after the consumer's ACK: a lease ends once, repeats do nothing. */
async function release (leases: readonly LeaseRef[], call: Call): Promise<void> {
  // One call each, all on one signal: more than ten are no leak.
  setMaxListeners(0, call.signal)
  await Promise.allSettled(leases.map(({ node, lease, wire }) => {
    const session = (wire as { remote_session_id?: unknown } | undefined)?.remote_session_id
    return requestOk(node, {
      method: 'POST', path: '/distserve/free_cache', json: { remote_engine_id: node.id, remote_session_id: session, ...(isOurNode(node) ? { lease } : {}) }, idempotent: true, timeout: 5000
    }, call)
  }))
}

/** LMDeploy's PyTorch engine (hybrid, P -> D) and our PyTorch-like engines with their encoders (E -> PD, P -> D, E -> P -> D). */
export const pytorch: Adapter = {
  specificationVersion: 'v1',
  name: 'pytorch',
  encodeDriver: 'gateway',
  probe,
  link,
  unlink,
  encode,
  prefill,
  generate,
  release,
  abort
}
