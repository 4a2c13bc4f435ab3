import type { Adapter, AdapterNode, Call, NodeInfo } from '../adapter.ts'
import { AdapterError } from '../adapter.ts'
import { engineInfo, health, infoOfLmdeploy, infoOfOurs, infoOfStarting, isOurs, models } from '../lmdeploy.ts'
import { pytorch } from '../pytorch/index.ts'
import { link, unlink } from '../pytorch/link.ts'
import { refuse } from '../plain.ts'

const NO_TRANSFER = 'LMDeploy\'s TurboMind has no feature transfer over HTTP: pictures are encoded by the node itself'

async function probe (node: AdapterNode, call: Call): Promise<NodeInfo> {
  const status = await health(node, call)
  if (status === 'initialising') return infoOfStarting(node)
  const [list, answer] = await Promise.all([models(node, call), engineInfo(node, call)])
  if (answer.kind === 'info' && isOurs(answer.info) && answer.info.backend === 'turbomind') return infoOfOurs(answer.info, status, list.ids, node)
  if (answer.kind === 'info') {
    throw new AdapterError('UNAVAILABLE', `${node.id} runs no TurboMind engine (engine_info answers): name the adapter pytorch`, { node: node.id })
  }
  const notes = [NO_TRANSFER, ...(node.role === 'hybrid' ? [] : [`TurboMind has no role ${node.role}`])]
  return await infoOfLmdeploy(node, 'turbomind', status, list.ids, undefined, notes, call)
}

const NO_PREFILL = 'TurboMind has no disaggregated prefill and decode: they stay on one node'

/**
 * LMDeploy's TurboMind engine (hybrid), and our TurboMind-like one with its shim, which takes features from the same
 * encoders over the same wire as a PyTorch-like engine (E -> PD). A real TurboMind says it accepts nothing.
 */
export const turbomind: Adapter = {
  specificationVersion: 'v1',
  name: 'turbomind',
  encodeDriver: 'gateway',
  probe,
  link,
  unlink,
  encode: job => refuse(job.node, 'TurboMind has no encoder role'),
  prefill: job => refuse(job.node, NO_PREFILL),
  generate: (job, call) => job.handoff === undefined ? pytorch.generate(job, call) : refuse(job.node, NO_PREFILL),
  release: pytorch.release,
  abort: pytorch.abort
}
