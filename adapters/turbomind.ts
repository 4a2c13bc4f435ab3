import { AdapterError, type Adapter, type AdapterNode, type Call, type NodeInfo } from './adapter.ts'
import { infoOfEpd } from './epd/info.ts'
import { infoOfLmdeploy } from './lmdeploy/info.ts'
import { refuse } from './pass-through.ts'
import { engineInfo, health, isOurs, models, startingInfo } from './probes.ts'
import { pytorch } from './pytorch.ts'

const NO_TRANSFER = 'LMDeploy\'s TurboMind has no feature transfer over HTTP: pictures are encoded by the node itself'
const NO_PREFILL = 'TurboMind has no disaggregated prefill and decode: they stay on one node'

async function probe (node: AdapterNode, call: Call): Promise<NodeInfo> {
  const status = await health(node, call)
  if (status === 'initialising') return startingInfo(node)
  const [list, answer] = await Promise.all([models(node, call), engineInfo(node, call)])
  if (answer.kind === 'info' && isOurs(answer.info) && answer.info.backend === 'turbomind') return { ...infoOfEpd(node, answer.info, status, list.ids), cards: list.cards }
  if (answer.kind === 'info') {
    throw new AdapterError('UNAVAILABLE', `${node.id} runs no TurboMind engine (engine_info answers): name the adapter pytorch`, { node: node.id })
  }
  const notes = [NO_TRANSFER, ...(node.role === 'hybrid' ? [] : [`TurboMind has no role ${node.role}`])]
  return { ...await infoOfLmdeploy(node, { backend: 'turbomind', status, models: list.ids, notes }, call), cards: list.cards }
}

/**
 * LMDeploy's TurboMind engine (hybrid), and our TurboMind-like one with its shim, which takes features from the same
 * encoders over the same wire as a PyTorch-like engine (E -> PD). LMDeploy's accepts no encoder results.
 */
export const turbomind: Adapter = {
  ...pytorch,
  name: 'turbomind',
  probe,
  encode: job => refuse(job.node, 'TurboMind has no encoder role'),
  prefill: job => refuse(job.node, NO_PREFILL),
  generate: (job, call) => job.handoff === undefined ? pytorch.generate(job, call) : refuse(job.node, NO_PREFILL)
}
