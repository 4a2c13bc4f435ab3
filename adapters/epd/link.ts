import type { Call, Link } from '../adapter.ts'
import { handshake, refused, type End, type InitAnswer, type Terms } from '../lmdeploy/handshake.ts'
import type { EngineInfoWire } from '../probes.ts'

const ZEROMQ: Terms = { protocol: 1, tcp_config: {}, rdma_config: null, nvlink_config: null }

const SHAPES = {
  'features:': { member: 'feature', keys: ['block_tokens', 'hidden_size', 'dtype', 'block_bytes'] },
  'kv:': { member: 'kv', keys: ['block_tokens', 'layers', 'kv_heads', 'head_dim', 'dtype', 'block_bytes'] }
} as const

/** Links two of our engines. The producer connects first, because the consumer may pull at once. */
export async function linkEpd (producer: End, consumer: End, call: Call): Promise<Link> {
  check(producer, consumer)
  const { offer, connected } = await handshake(producer, consumer, ZEROMQ, 'producer', call)
  return { from: producer.node.id, to: consumer.node.id, transport: transportOf(offer, connected), epochs: [producer.info.epoch, consumer.info.epoch] }
}

/** All that shows before a socket is opened. */
function check ({ node: a, info: infoA }: End, { node: b, info: infoB }: End): void {
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

/** The consumer knows which transport it has taken; without its word, the one that the producer offers. */
function transportOf (offer: InitAnswer, connected: InitAnswer): string {
  if (typeof connected.transport === 'string') return `zmq+${connected.transport}`
  const scheme = /^(\w+):\/\//.exec(offer.engine_endpoint_info?.zmq_address ?? '')?.[1]
  return scheme === undefined ? 'zmq' : `zmq+${scheme}`
}
