import { AdapterError, type AdapterNode, type Call, type Link } from '../adapter.ts'
import { MIGRATION_PROTOCOL, type TransferTerms } from '../wire/distserve.ts'
import { handshake, refused, type End } from './handshake.ts'
import { namingOf, UNNAMED } from './sessions.ts'

/** GPUDirect over Ethernet, as LMDeploy's proxy asks for; an engine built for NVLink takes that. */
const RDMA: TransferTerms = { protocol: MIGRATION_PROTOCOL.rdma, tcp_config: null, rdma_config: { with_gdr: true, link_type: 2 }, nvlink_config: {} }

/** LMDeploy itself compares only the first of these; a difference in the second kills D's engine at the first request. */
const EQUAL = ['tp_size', 'block_size'] as const

/** Links P to D of LMDeploy's PyTorch engine. D connects first, as LMDeploy's router does it. */
export async function linkLmdeploy (p: End, d: End, call: Call): Promise<Link> {
  check(p, d)
  await checkNaming(p.node, call)
  await handshake(p, d, RDMA, 'consumer', call)
  return { from: p.node.id, to: d.node.id, transport: 'rdma', epochs: [p.info.epoch, d.info.epoch] }
}

function check ({ node: a, info: infoA }: End, { node: b, info: infoB }: End): void {
  if (a.role !== 'prefill' || b.role !== 'decode') throw refused(a, b, 'an lmdeploy api_server knows no encoder role, and hands KV blocks on from prefill to decode only')
  for (const key of EQUAL) {
    if (infoA[key] !== infoB[key]) throw refused(a, b, `their ${key} differs (${String(infoA[key])} and ${String(infoB[key])})`)
  }
}

/** Before KV blocks of a request are at stake. */
async function checkNaming (p: AdapterNode, call: Call): Promise<void> {
  const model = p.info?.models[0]
  if (model !== undefined && await namingOf(p, model, call) === 'none') throw new AdapterError('REFUSED', `${p.id}: ${UNNAMED}`, { node: p.id })
}
