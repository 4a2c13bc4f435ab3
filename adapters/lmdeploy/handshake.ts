/** LMDeploy's P2P handshake over HTTP, which our engines speak too: initialize both ends, connect both ends. */
import { AdapterError, type AdapterNode, type Call } from '../adapter.ts'
import { requestOk } from '../http.ts'
import type { EngineInfoWire } from '../probes.ts'

/** LMDeploy's DistServeConnectionStatus. */
const SUCCESS = 1

/** What both ends are asked for: how blocks travel, and which end connects first. */
export interface Terms {
  /** LMDeploy's MigrationProtocol. */
  readonly protocol: 1 | 2
  readonly tcp_config: object | null
  readonly rdma_config: object | null
  readonly nvlink_config: object | null
}

export interface InitAnswer {
  readonly status?: number
  readonly message?: string
  readonly code?: string
  readonly transport?: string
  readonly engine_endpoint_info?: { readonly zmq_address?: string }
  readonly kvtransfer_endpoint_info?: unknown
}

/** One end of a link: the node and the engine_info it has just answered. */
export interface End {
  readonly node: AdapterNode
  readonly info: EngineInfoWire
}

export function refused (a: AdapterNode, b: AdapterNode, reason: string): AdapterError {
  return new AdapterError('REFUSED', `${a.id} and ${b.id} can't be linked: ${reason}`, { node: b.id })
}

/**
 * The four calls that link a producer and a consumer; `first` connects before the other. A failure half way is undone on both ends.
 *
 * @returns what the producer offered, and what the consumer answered when it connected
 * @throws AdapterError REFUSED with the reason when an end refuses, UNAVAILABLE when another try may help
 */
export async function handshake (producer: End, consumer: End, terms: Terms, first: 'producer' | 'consumer', call: Call): Promise<{ offer: InitAnswer, connected: InitAnswer }> {
  const { node: a } = producer
  const { node: b } = consumer
  try {
    const [offerA, offerB] = await Promise.all([initialize(producer, consumer, terms, call), initialize(consumer, producer, terms, call)])
    const early = first === 'consumer' ? await connect(b, a, offerA, terms, call) : undefined
    await connect(a, b, offerB, terms, call)
    return { offer: offerA, connected: early ?? await connect(b, a, offerA, terms, call) }
  } catch (error) {
    if (!call.signal.aborted) await unlink(a, b, call)
    if (!AdapterError.is(error) || error.code !== 'REJECTED') throw error
    throw new AdapterError('REFUSED', error.message, { node: error.node, cause: error })
  }
}

async function initialize ({ node: local, info: localInfo }: End, { node: remote, info: remoteInfo }: End, terms: Terms, call: Call): Promise<InitAnswer> {
  const json = {
    local_engine_id: local.id,
    local_engine_config: localInfo,
    remote_engine_id: remote.id,
    remote_engine_config: remoteInfo,
    rank: null,
    ...terms
  }
  const answer = await requestOk(local, { method: 'POST', path: '/distserve/p2p_initialize', json, idempotent: true }, call) as InitAnswer
  confirm(local, remote, answer)
  return answer
}

/** The infos of the other end go through as they came, unknown members included. */
async function connect (local: AdapterNode, remote: AdapterNode, offer: InitAnswer, { protocol }: Terms, call: Call): Promise<InitAnswer> {
  const json = {
    protocol,
    remote_engine_id: remote.id,
    remote_engine_endpoint_info: offer.engine_endpoint_info,
    remote_kvtransfer_endpoint_info: offer.kvtransfer_endpoint_info
  }
  const answer = await requestOk(local, { method: 'POST', path: '/distserve/p2p_connect', json, idempotent: true }, call) as InitAnswer
  confirm(local, remote, answer)
  return answer
}

/** A refusal is a 200 with a status of its own, which LMDeploy's proxy never reads. */
function confirm (local: AdapterNode, remote: AdapterNode, answer: InitAnswer): void {
  if (answer.status === SUCCESS) return
  const reason = answer.message ?? `${local.id} answered status ${String(answer.status)}`
  // A failure without a code counts as a mismatch, which another try does not mend.
  if (answer.code === undefined || answer.code === 'REFUSED') throw refused(local, remote, reason)
  throw new AdapterError('UNAVAILABLE', `${local.id} could not connect to ${remote.id}: ${reason}`, { node: local.id })
}

/** Best effort, never throws. */
export async function unlink (a: AdapterNode, b: AdapterNode, call: Call): Promise<void> {
  const drop = (node: AdapterNode, other: AdapterNode): Promise<unknown> => requestOk(node, {
    method: 'POST', path: '/distserve/p2p_drop_connect', json: { engine_id: node.id, remote_engine_id: other.id }, timeout: 3000
  }, call)
  await Promise.allSettled([drop(a, b), drop(b, a)])
}
