/** LMDeploy's P2P handshake over HTTP, which our engines speak too: initialize both ends, connect both ends. */
import { AdapterError, type AdapterNode, type Call } from '../adapter.ts'
import { requestOk } from '../http/json.ts'
import type { EngineInfoAnswered } from '../probes.ts'
import { CONNECTION_STATUS, type P2PConnect, type P2PInitialize, type TransferTerms } from '../wire/distserve.ts'
import { objectOf, textOf, type Json } from '../wire/json.ts'

/** One end of a link: the node and the engine_info it has just answered. */
export interface End {
  readonly node: AdapterNode
  readonly info: EngineInfoAnswered
}

export function refused (a: AdapterNode, b: AdapterNode, reason: string): AdapterError {
  return new AdapterError('REFUSED', `${a.id} and ${b.id} can't be linked: ${reason}`, { node: b.id })
}

/**
 * The four calls that link a producer and a consumer; `first` connects before the other. A failure half way is undone on both ends.
 *
 * @returns the endpoints that the producer offered
 * @throws AdapterError REFUSED with the reason when an end refuses, UNAVAILABLE when another try may help
 */
export async function handshake (producer: End, consumer: End, terms: TransferTerms, first: 'producer' | 'consumer', call: Call): Promise<Json> {
  const { node: a } = producer
  const { node: b } = consumer
  try {
    const [offerA, offerB] = await Promise.all([initialize(producer, consumer, terms, call), initialize(consumer, producer, terms, call)])
    if (first === 'consumer') await connect(b, a, offerA, terms, call)
    await connect(a, b, offerB, terms, call)
    if (first === 'producer') await connect(b, a, offerA, terms, call)
    return offerA
  } catch (error) {
    if (!call.signal.aborted) await unlink(a, b, call)
    if (!AdapterError.is(error) || error.code !== 'REJECTED') throw error
    throw new AdapterError('REFUSED', error.message, { node: error.node, cause: error })
  }
}

async function initialize ({ node: local, info: localInfo }: End, { node: remote, info: remoteInfo }: End, terms: TransferTerms, call: Call): Promise<Json> {
  const json: P2PInitialize = {
    local_engine_id: local.id,
    local_engine_config: localInfo,
    remote_engine_id: remote.id,
    remote_engine_config: remoteInfo,
    rank: null,
    ...terms
  }
  const answer = objectOf(await requestOk(local, { method: 'POST', path: '/distserve/p2p_initialize', json, idempotent: true }, call))
  confirm(local, remote, answer)
  return answer
}

/** The infos of the other end go through as they came, unknown members included. */
async function connect (local: AdapterNode, remote: AdapterNode, offer: Json, { protocol }: TransferTerms, call: Call): Promise<void> {
  const json: P2PConnect = {
    protocol,
    remote_engine_id: remote.id,
    remote_engine_endpoint_info: offer.engine_endpoint_info,
    remote_kvtransfer_endpoint_info: offer.kvtransfer_endpoint_info
  }
  confirm(local, remote, objectOf(await requestOk(local, { method: 'POST', path: '/distserve/p2p_connect', json, idempotent: true }, call)))
}

/** A refusal is a 200 with a status of its own, which LMDeploy's proxy never reads. */
function confirm (local: AdapterNode, remote: AdapterNode, answer: Json): void {
  if (answer.status === CONNECTION_STATUS.success) return
  const reason = textOf(answer.message) ?? `${local.id} answered status ${String(answer.status)}`
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
