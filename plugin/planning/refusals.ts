/** Why no plan is possible. */
import type { RegistrySnapshot } from '../registry/index.ts'
import type { PlanOptions, Pool, Refusal } from './types.ts'
import type { RequestView } from './view.ts'

export function unknownModel ({ nodes }: RegistrySnapshot, model: string): Refusal {
  if (nodes.length === 0) return noNode('no node is registered')
  // Encoders can't answer without a language model, but they show that the operator means to serve this model.
  if (nodes.some(node => node.models.includes(model))) return noNode('no node of this model generates')
  if (nodes.some(node => node.models.length === 0 && node.state !== 'healthy')) return noNode('nodes are starting')
  return { refused: 'EPD_ERR_MODEL_NOT_FOUND', reason: 'no node serves this model' }
}

/** @param missing why the request can't be disaggregated */
export function noWay ({ singleNode, media }: RequestView, { hybrids, prefills, decodes }: Pool, { routing }: PlanOptions, missing = ''): Refusal {
  const total = hybrids.length + prefills.length + decodes.length
  if (total === hybrids.length) return noNode(`none of ${total} nodes is healthy`)
  if (hybrids.length > 0) return noNode(missing === '' ? `none of ${hybrids.length} nodes that do both is healthy` : `none of ${total} nodes can serve it (${missing})`)
  if (routing.disaggregate === 'never') return noNode('disaggregation is off, and no node does both prefill and decode')
  if (singleNode?.source === 'request') return { refused: 'EPD_ERR_NO_HYBRID', reason: singleNode.what, param: singleNode.param }
  if (singleNode !== undefined) return noNode(`${singleNode.what}, and no node does both`)
  if (missing.startsWith('prompt too long')) return { refused: 'EPD_ERR_NO_HYBRID', reason: 'a prompt this long', param: media.length > 0 ? 'messages' : undefined }
  return noNode(missing)
}

function noNode (reason: string): Refusal {
  return { refused: 'EPD_ERR_NO_NODE', reason }
}
