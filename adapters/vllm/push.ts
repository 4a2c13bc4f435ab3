/** ECMooncakeConnector: E pushes features into the consumer's memory, so that it must know the consumer before it encodes. */
import { randomUUID } from 'node:crypto'
import type { AdapterNode, Log, RequestBody } from '../adapter.ts'

/** An optional peer: a name that a bundler can't resolve stays out of the bundle. */
const ZEROMQ: string = 'zeromq'

/** One data-parallel replica of a consumer, by its control address. */
export interface Receiver {
  readonly address: string
  /** Undefined where the consumer has one replica. */
  readonly rank: number | undefined
}

/** Features of one item on their way. */
export interface Push extends Receiver {
  readonly transfer: string
}

/** Milliseconds that a consumer may take to answer on its control socket. */
const CONTROL_MS = 2_000

/** Which replica gets the features of a request: one for all of its encoders, in turn. */
export class Receivers {
  readonly #chosen = new WeakMap<RequestBody, Map<string, Receiver>>()
  #next = 0

  /** Undefined for a consumer that fetches features itself. */
  of ({ id, ecZmqAddrs = [] }: AdapterNode, body: RequestBody): Receiver | undefined {
    if (ecZmqAddrs.length === 0) return undefined
    const chosen = this.#chosen.get(body) ?? new Map<string, Receiver>()
    this.#chosen.set(body, chosen)
    let receiver = chosen.get(id)
    if (receiver === undefined) {
      const rank = this.#next++ % ecZmqAddrs.length
      receiver = { address: ecZmqAddrs[rank]!, rank: ecZmqAddrs.length > 1 ? rank : undefined }
      chosen.set(id, receiver)
    }
    return receiver
  }
}

export function newPush (receiver: Receiver): Push {
  return { ...receiver, transfer: randomUUID().replaceAll('-', '') }
}

/** For E: `ec_items` stand for the media parts, in their order. */
export function pushOrder (pushes: readonly Push[]): string {
  return JSON.stringify({ consumer_zmq: pushes[0]!.address, ec_items: pushes.map(({ transfer }) => ({ transfer_id: transfer })) })
}

/**
 * What no request will take: the consumer frees the memory that it keeps for it. Never rejects.
 *
 * @param abandon - the encoder may have ended: the consumer is not to wait for the rest of what it was writing. From an encoder
 * that lives the rest would arrive in memory that has another owner.
 */
export async function cancelPushes (pushes: readonly Push[], { abandon }: { readonly abandon: boolean }, log: Log): Promise<void> {
  if (pushes.length === 0) return
  const addresses = new Set(pushes.map(({ address }) => address))
  await Promise.all([...addresses].map(async address => {
    const group = pushes.filter(push => push.address === address)
    try {
      // Every tensor-parallel rank keeps memory of its own.
      const [{ ports }] = await exchange<{ ports: number[] }>(address, [{ op: 'peers' }]) as [{ ports: number[] }]
      const shards = ports.map(port => address.replace(/:\d+$/, `:${port}`))
      const orders = group.map(({ transfer }) => ({ op: 'cancel', transfer_id: transfer, reservation_id: '', ...(abandon ? { abandon } : {}) }))
      await Promise.all(shards.map(async shard => await exchange(shard, orders)))
    } catch (err) {
      // The consumer gives up by itself after 300 s.
      log.warn({ err, address }, 'features on their way could not be cancelled')
    }
  }))
}

/** Requests on one control socket, one after the other. */
async function exchange<T> (address: string, requests: readonly object[]): Promise<T[]> {
  // Only gateways before this connector need it.
  const { Request } = await (import(ZEROMQ) as Promise<typeof import('zeromq')>)
  const socket = new Request({ linger: 0, immediate: true, sendTimeout: CONTROL_MS, receiveTimeout: CONTROL_MS })
  try {
    socket.connect(address)
    const results: T[] = []
    for (const request of requests) {
      await socket.send(JSON.stringify(request))
      const [frame] = await socket.receive()
      const { ok, result, error } = JSON.parse(frame!.toString()) as { ok?: boolean, result: T, error?: string }
      if (ok !== true) throw new Error(`${address}: ${error ?? 'refused'}`)
      results.push(result)
    }
    return results
  } finally {
    socket.close()
  }
}
