import { AdapterError, type AdapterNode, type Call, type Link } from '../adapter.ts'
import { requestOk } from '../http.ts'
import { engineInfo, isOurs, type EngineInfoWire } from '../lmdeploy.ts'

/** LMDeploy's MigrationProtocol and DistServeConnectionStatus. */
const TCP = 1
const SUCCESS = 1

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
  if (answer.kind === 'info' && isOurs(answer.info)) return answer.info
  throw new AdapterError('REFUSED', `${node.id} is an lmdeploy api_server, which knows no encoder role`, { node: node.id })
}

/** What can be told before any socket is opened. */
function check (a: AdapterNode, b: AdapterNode, infoA: EngineInfoWire, infoB: EngineInfoWire): void {
  if (infoA.fingerprint !== infoB.fingerprint) throw refused(a, b, 'their models or processors differ (fingerprint)')
  const format = (infoA.produces ?? []).find(name => name.startsWith('features:') && (infoB.accepts ?? []).includes(name))
  if (format === undefined) throw refused(a, b, 'they have no transfer format in common')
  // Only the shape matters; how many blocks each has may differ.
  const shape = (info: EngineInfoWire): Record<string, unknown> => (info.feature ?? {}) as Record<string, unknown>
  for (const key of ['block_tokens', 'hidden_size', 'dtype', 'block_bytes']) {
    const [one, other] = [shape(infoA)[key], shape(infoB)[key]]
    if (one !== undefined && other !== undefined && one !== other) throw refused(a, b, `feature blocks differ in ${key} (${String(one)} and ${String(other)})`)
  }
}

async function initialize (local: AdapterNode, remote: AdapterNode, infoLocal: EngineInfoWire, infoRemote: EngineInfoWire, call: Call): Promise<InitAnswer> {
  const json = {
    local_engine_id: local.id,
    local_engine_config: infoLocal,
    remote_engine_id: remote.id,
    remote_engine_config: infoRemote,
    protocol: TCP,
    rank: null,
    tcp_config: {},
    rdma_config: null,
    nvlink_config: null
  }
  const answer = await requestOk(local, { method: 'POST', path: '/distserve/p2p_initialize', json, idempotent: true }, call) as InitAnswer
  confirm(local, remote, answer)
  return answer
}

/** The infos of the other end go through as they came, unknown members included. */
async function connect (local: AdapterNode, remote: AdapterNode, init: InitAnswer, call: Call): Promise<InitAnswer> {
  const json = {
    protocol: TCP,
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
function transportOf (init: InitAnswer, connected: InitAnswer): string {
  if (typeof connected.transport === 'string') return `zmq+${connected.transport}`
  const scheme = /^(\w+):\/\//.exec(init.engine_endpoint_info?.zmq_address ?? '')?.[1]
  return scheme === undefined ? 'zmq' : `zmq+${scheme}`
}

/** The four calls of LMDeploy's handshake, the producer's first. A failure half way is undone on both ends. */
export async function link (a: AdapterNode, b: AdapterNode, call: Call): Promise<Link> {
  const [infoA, infoB] = await Promise.all([infoOf(a, call), infoOf(b, call)])
  check(a, b, infoA, infoB)
  try {
    const [initA, initB] = await Promise.all([initialize(a, b, infoA, infoB, call), initialize(b, a, infoB, infoA, call)])
    await connect(a, b, initB, call)
    const connected = await connect(b, a, initA, call)
    return { from: a.id, to: b.id, transport: transportOf(initA, connected), epochs: [infoA.epoch, infoB.epoch] }
  } catch (error) {
    if (!call.signal.aborted) await unlink(a, b, call)
    if (!AdapterError.is(error) || error.code !== 'REJECTED') throw error
    throw new AdapterError('REFUSED', error.message, { node: error.node, cause: error })
  }
}

export async function unlink (a: AdapterNode, b: AdapterNode, call: Call): Promise<void> {
  const drop = (node: AdapterNode, other: AdapterNode): Promise<unknown> => requestOk(node, {
    method: 'POST', path: '/distserve/p2p_drop_connect', json: { engine_id: node.id, remote_engine_id: other.id }, timeout: 3000
  }, call)
  await Promise.allSettled([drop(a, b), drop(b, a)])
}
