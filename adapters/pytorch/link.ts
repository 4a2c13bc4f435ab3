import { AdapterError, type AdapterNode, type Call, type Link } from '../adapter.ts'
import { requestOk } from '../http.ts'
import { engineInfo, isOurs, type EngineInfoWire } from '../lmdeploy.ts'
import { namingOf, UNNAMED } from './sessions.ts'

/** LMDeploy's DistServeConnectionStatus. */
const SUCCESS = 1

/** What both ends are told of the way blocks take. */
interface Terms {
  /** LMDeploy's MigrationProtocol. */
  readonly protocol: 1 | 2
  readonly tcp_config: object | null
  readonly rdma_config: object | null
  readonly nvlink_config: object | null
}

const ZEROMQ: Terms = { protocol: 1, tcp_config: {}, rdma_config: null, nvlink_config: null }
/** GPUDirect over Ethernet, as LMDeploy's proxy asks for; an engine built for NVLink takes that. */
const RDMA: Terms = { protocol: 2, tcp_config: null, rdma_config: { with_gdr: true, link_type: 2 }, nvlink_config: {} }

interface InitAnswer {
  readonly status?: number
  readonly message?: string
  readonly code?: string
  readonly transport?: string
  readonly engine_endpoint_info?: { readonly zmq_address?: string }
  readonly kvtransfer_endpoint_info?: unknown
}

function refused (a: AdapterNode, b: AdapterNode, reason: string): AdapterError {
  return new AdapterError('REFUSED', `${a.id} and ${b.id} can't be linked: ${reason}`, { node: b.id })
}

async function infoOf (node: AdapterNode, call: Call): Promise<EngineInfoWire> {
  const answer = await engineInfo(node, call)
  if (answer.kind === 'info') return answer.info
  throw new AdapterError('REFUSED', `${node.id} is an lmdeploy api_server that moves no blocks, and knows no encoder role`, { node: node.id })
}

const SHAPES = {
  'features:': { member: 'feature', keys: ['block_tokens', 'hidden_size', 'dtype', 'block_bytes'] },
  'kv:': { member: 'kv', keys: ['block_tokens', 'layers', 'kv_heads', 'head_dim', 'dtype', 'block_bytes'] }
} as const

/** What can be told of two of our engines before any socket is opened. */
function checkOurs (a: AdapterNode, b: AdapterNode, infoA: EngineInfoWire, infoB: EngineInfoWire): void {
  if (infoA.fingerprint !== infoB.fingerprint) throw refused(a, b, 'their models or processors differ (fingerprint)')
  const format = (infoA.produces ?? []).find(name => (infoB.accepts ?? []).includes(name))
  const shape = format === undefined ? undefined : SHAPES[format.startsWith('kv:') ? 'kv:' : 'features:']
  if (shape === undefined) throw refused(a, b, 'they have no transfer format in common')
  // Only the shape matters; how many blocks each has may differ.
  const of = (info: EngineInfoWire): Record<string, unknown> => (info[shape.member] ?? {}) as Record<string, unknown>
  for (const key of shape.keys) {
    const [one, other] = [of(infoA)[key], of(infoB)[key]]
    if (one !== undefined && other !== undefined && one !== other) throw refused(a, b, `${shape.member} blocks differ in ${key} (${String(one)} and ${String(other)})`)
  }
}

/** LMDeploy itself compares the first of these alone; the second kills D's engine at the first request. */
const EQUAL = ['tp_size', 'block_size'] as const

function checkLmdeploy (a: AdapterNode, b: AdapterNode, infoA: EngineInfoWire, infoB: EngineInfoWire): void {
  if (a.role !== 'prefill' || b.role !== 'decode') throw refused(a, b, 'an lmdeploy api_server knows no encoder role, and hands KV blocks on from prefill to decode only')
  for (const key of EQUAL) {
    if (infoA[key] !== infoB[key]) throw refused(a, b, `their ${key} differs (${String(infoA[key])} and ${String(infoB[key])})`)
  }
}

/** Refuses what can't work, with the reason. */
function termsOf (a: AdapterNode, b: AdapterNode, infoA: EngineInfoWire, infoB: EngineInfoWire): Terms {
  if (isOurs(infoA) !== isOurs(infoB)) throw refused(a, b, `${(isOurs(infoA) ? b : a).id} is an lmdeploy api_server, which knows no encoder role and moves blocks in a way of its own`)
  if (isOurs(infoA)) {
    checkOurs(a, b, infoA, infoB)
    return ZEROMQ
  }
  checkLmdeploy(a, b, infoA, infoB)
  return RDMA
}

async function initialize (local: AdapterNode, remote: AdapterNode, infoLocal: EngineInfoWire, infoRemote: EngineInfoWire, terms: Terms, call: Call): Promise<InitAnswer> {
  const json = {
    local_engine_id: local.id,
    local_engine_config: infoLocal,
    remote_engine_id: remote.id,
    remote_engine_config: infoRemote,
    rank: null,
    ...terms
  }
  const answer = await requestOk(local, { method: 'POST', path: '/distserve/p2p_initialize', json, idempotent: true }, call) as InitAnswer
  confirm(local, remote, answer)
  return answer
}

/** The infos of the other end go through as they came, unknown members included. */
async function connect (local: AdapterNode, remote: AdapterNode, init: InitAnswer, { protocol }: Terms, call: Call): Promise<InitAnswer> {
  const json = {
    protocol,
    remote_engine_id: remote.id,
    remote_engine_endpoint_info: init.engine_endpoint_info,
    remote_kvtransfer_endpoint_info: init.kvtransfer_endpoint_info
  }
  const answer = await requestOk(local, { method: 'POST', path: '/distserve/p2p_connect', json, idempotent: true }, call) as InitAnswer
  confirm(local, remote, answer)
  return answer
}

/** LMDeploy answers 200 with a status of its own, which its proxy never looks at. */
function confirm (local: AdapterNode, remote: AdapterNode, answer: InitAnswer): void {
  if (answer.status === SUCCESS) return
  const reason = answer.message ?? `${local.id} answered status ${String(answer.status)}`
  // Without a code a failure is taken for a mismatch, which trying again does not mend.
  if (answer.code === undefined || answer.code === 'REFUSED') throw refused(local, remote, reason)
  throw new AdapterError('UNAVAILABLE', `${local.id} could not connect to ${remote.id}: ${reason}`, { node: local.id })
}

/** The consumer knows which way it takes; else what the producer offers. */
function transportOf (init: InitAnswer, connected: InitAnswer, terms: Terms): string {
  if (terms === RDMA) return 'rdma'
  if (typeof connected.transport === 'string') return `zmq+${connected.transport}`
  const scheme = /^(\w+):\/\//.exec(init.engine_endpoint_info?.zmq_address ?? '')?.[1]
  return scheme === undefined ? 'zmq' : `zmq+${scheme}`
}

/**
 * The four calls of LMDeploy's handshake, the producer connected before the consumer, who may pull at once; LMDeploy's own
 * are connected the other way round, as its router does. A failure half way is undone on both ends.
 */
export async function link (a: AdapterNode, b: AdapterNode, call: Call): Promise<Link> {
  const [infoA, infoB] = await Promise.all([infoOf(a, call), infoOf(b, call)])
  const terms = termsOf(a, b, infoA, infoB)
  try {
    if (terms === RDMA) await checkNaming(a, call)
    const [initA, initB] = await Promise.all([initialize(a, b, infoA, infoB, terms, call), initialize(b, a, infoB, infoA, terms, call)])
    const consumer = (): Promise<InitAnswer> => connect(b, a, initA, terms, call)
    const early = terms === RDMA ? await consumer() : undefined
    await connect(a, b, initB, terms, call)
    const connected = early ?? await consumer()
    return { from: a.id, to: b.id, transport: transportOf(initA, connected, terms), epochs: [infoA.epoch, infoB.epoch] }
  } catch (error) {
    if (!call.signal.aborted) await unlink(a, b, call)
    if (!AdapterError.is(error) || error.code !== 'REJECTED') throw error
    throw new AdapterError('REFUSED', error.message, { node: error.node, cause: error })
  }
}

/** Before any request's KV blocks are at stake. */
async function checkNaming (p: AdapterNode, call: Call): Promise<void> {
  const model = p.info?.models[0]
  if (model !== undefined && await namingOf(p, model, call) === 'none') throw new AdapterError('REFUSED', `${p.id}: ${UNNAMED}`, { node: p.id })
}

export async function unlink (a: AdapterNode, b: AdapterNode, call: Call): Promise<void> {
  const drop = (node: AdapterNode, other: AdapterNode): Promise<unknown> => requestOk(node, {
    method: 'POST', path: '/distserve/p2p_drop_connect', json: { engine_id: node.id, remote_engine_id: other.id }, timeout: 3000
  }, call)
  await Promise.allSettled([drop(a, b), drop(b, a)])
}
