import type { Call, Link } from '../adapter.ts'
import { handshake, refused, type End } from '../lmdeploy/handshake.ts'
import type { EngineInfoAnswered } from '../probes.ts'
import { MIGRATION_PROTOCOL, type TransferTerms } from '../wire/distserve.ts'
import { objectOf, textOf, type Json } from '../wire/json.ts'

const ZEROMQ: TransferTerms = { protocol: MIGRATION_PROTOCOL.tcp, tcp_config: {}, rdma_config: null, nvlink_config: null }

const SHAPES = {
  'features:': { member: 'feature', keys: ['block_tokens', 'hidden_size', 'dtype', 'block_bytes'] },
  'kv:': { member: 'kv', keys: ['block_tokens', 'layers', 'kv_heads', 'head_dim', 'dtype', 'block_bytes'] }
} as const

/** Links two of our engines. The producer connects first, because the consumer may pull at once. */
export async function linkEpd (producer: End, consumer: End, call: Call): Promise<Link> {
  check(producer, consumer)
  const offer = await handshake(producer, consumer, ZEROMQ, 'producer', call)
  return { from: producer.node.id, to: consumer.node.id, transport: transportOf(offer), epochs: [producer.info.epoch, consumer.info.epoch] }
}

/** All that shows before a socket is opened. */
function check ({ node: a, info: infoA }: End, { node: b, info: infoB }: End): void {
  if (infoA.fingerprint !== infoB.fingerprint) throw refused(a, b, 'their models or processors differ (fingerprint)')
  const format = (infoA.produces ?? []).find(name => (infoB.accepts ?? []).includes(name))
  const shape = format === undefined ? undefined : SHAPES[format.startsWith('kv:') ? 'kv:' : 'features:']
  if (shape === undefined) throw refused(a, b, 'they have no transfer format in common')
  // Only the shape matters; how many blocks each has may differ.
  const of = (info: EngineInfoAnswered): Json => objectOf(info[shape.member])
  for (const key of shape.keys) {
    const [one, other] = [of(infoA)[key], of(infoB)[key]]
    if (one !== undefined && other !== undefined && one !== other) throw refused(a, b, `${shape.member} blocks differ in ${key} (${String(one)} and ${String(other)})`)
  }
}

/** The transport that the producer offers. */
function transportOf (offer: Json): string {
  const scheme = /^(\w+):\/\//.exec(textOf(objectOf(offer.engine_endpoint_info).zmq_address) ?? '')?.[1]
  return scheme === undefined ? 'zmq' : `zmq+${scheme}`
}
