import { AdapterError, type Adapter, type AdapterNode, type Call, type EncoderResult, type GenerateJob, type Handoff, type LeaseRef, type Link, type NodeInfo, type PrefillJob, type RequestBody, type UpstreamResponse } from './adapter.ts'
import { abortEpd, freeLease } from './epd/cleanup.ts'
import { encodeEpd } from './epd/encode.ts'
import { generateEpd } from './epd/generate.ts'
import { infoOfEpd } from './epd/info.ts'
import { linkEpd } from './epd/link.ts'
import { prefillEpd } from './epd/prefill.ts'
import { prepareEpd } from './epd/prepare.ts'
import { generateLmdeploy } from './lmdeploy/generate.ts'
import { refused, unlink, type End } from './lmdeploy/handshake.ts'
import { infoOfLmdeploy } from './lmdeploy/info.ts'
import { linkLmdeploy } from './lmdeploy/link.ts'
import { prefillLmdeploy } from './lmdeploy/prefill.ts'
import { releaseSession } from './lmdeploy/sessions.ts'
import { refuse } from './pass-through.ts'
import { engineInfo, health, isOurs, models, servedByEpd, startingInfo } from './probes.ts'

/** Finds out which server runs behind the node, ours or LMDeploy's: {@link servedByEpd} then chooses for every later call. */
async function probe (node: AdapterNode, call: Call): Promise<NodeInfo> {
  const status = await health(node, call)
  if (status === 'initialising') return startingInfo(node)
  const [list, answer] = await Promise.all([models(node, call), engineInfo(node, call)])
  if (answer.kind === 'info' && isOurs(answer.info)) {
    const info = { ...infoOfEpd(node, answer.info, status, list.ids), cards: list.cards }
    return answer.info.backend === 'turbomind' ? { ...info, produces: [], accepts: [], notes: [...info.notes ?? [], 'runs a TurboMind engine: name the adapter turbomind'] } : info
  }
  const notes = {
    info: [],
    turbomind: ['/distserve/engine_info answers 500, as a TurboMind engine does: name the adapter turbomind'],
    absent: ['has no /distserve: too old for disaggregation']
  }[answer.kind]
  return { ...await infoOfLmdeploy(node, { backend: 'pytorch', status, models: list.ids, engine: answer.kind === 'info' ? answer.info : undefined, notes }, call), cards: list.cards }
}

async function link (a: AdapterNode, b: AdapterNode, call: Call): Promise<Link> {
  const [producer, consumer] = await Promise.all([endOf(a, call), endOf(b, call)])
  const ours = isOurs(producer.info)
  if (ours !== isOurs(consumer.info)) throw refused(a, b, `${(ours ? b : a).id} is an lmdeploy api_server, which knows no encoder role and moves blocks in a way of its own`)
  try {
    return await (ours ? linkEpd : linkLmdeploy)(producer, consumer, call)
  } catch (error) {
    if (!AdapterError.is(error) || error.code !== 'REJECTED') throw error
    throw new AdapterError('REFUSED', error.message, { node: error.node, cause: error })
  }
}

/** A node with what it is at this moment: it may have restarted since its last probe. */
async function endOf (node: AdapterNode, call: Call): Promise<End> {
  const answer = await engineInfo(node, call)
  if (answer.kind === 'info') return { node, info: answer.info }
  throw new AdapterError('REFUSED', `${node.id} is an lmdeploy api_server that moves no blocks, and knows no encoder role`, { node: node.id })
}

async function prefill (job: PrefillJob, call: Call): Promise<Handoff> {
  const { node, body, features } = job
  if (node.info?.produces.some(format => format.startsWith('kv:')) !== true) return await refuse(node, `${node.id} hands no KV blocks on`)
  const reason = unfit(node, body, features)
  if (reason !== undefined) throw new AdapterError('KV_GONE', reason, { node: node.id, singleNode: true })
  return await (servedByEpd(node) ? prefillEpd : prefillLmdeploy)(job, call)
}

function generate (job: GenerateJob, call: Call): Promise<UpstreamResponse> {
  const { node, body, features, handoff } = job
  if (handoff !== undefined) {
    if (node.info?.accepts.some(format => format.startsWith('kv:')) !== true) return refuse(node, `${node.id} takes no migration request`)
  } else if (features.length > 0) {
    const reason = unfit(node, body, features)
    if (reason !== undefined) return refuse(node, reason)
  }
  return (servedByEpd(node) ? generateEpd : generateLmdeploy)(job, call)
}

/** Why a node can't take the request with these features; undefined when it can. Pixels go to nodes with vision weights only. */
function unfit (node: AdapterNode, body: RequestBody, features: readonly EncoderResult[]): string | undefined {
  if (features.length > 0 && node.info?.accepts.some(format => format.startsWith('features:')) === false) return `${node.id} takes no encoder results`
  const missing = body.media.length - new Set(features.map(feature => feature.item)).size
  if (missing === 0 || node.info?.vision === 'full') return undefined
  return `${node.id} has no vision weights, and ${missing} media items are not encoded`
}

async function release (leases: readonly LeaseRef[], call: Call): Promise<void> {
  await Promise.all(leases.map(lease => (servedByEpd(lease.node) ? freeLease : releaseSession)(lease, call)))
}

/** LMDeploy's api_server stops by itself when the connection closes, and knows no request ids. */
async function abort (node: AdapterNode, requestId: string, call: Call): Promise<void> {
  if (servedByEpd(node)) await abortEpd(node, requestId, call)
}

/**
 * LMDeploy's PyTorch engine (hybrid, P -> D) and our PyTorch-like engines with their encoders (E -> PD, P -> D,
 * E -> P -> D). Only our engines have the role encoder.
 */
export const pytorch: Adapter = {
  specificationVersion: 'v1',
  name: 'pytorch',
  probe,
  link,
  unlink,
  encode: encodeEpd,
  prepare: prepareEpd,
  prefill,
  generate,
  release,
  abort
}
