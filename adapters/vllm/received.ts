/** Features that encoders have pushed to the consumer: what its request says of them, and their end. */
import type { Call, EncoderResult, LeaseRef, Log } from '../adapter.ts'
import type { Encoded } from './encode.ts'
import { cancelPushes } from './push.ts'

const RANK_HEADER = 'x-data-parallel-rank'

export function isPushed (features: readonly EncoderResult[]): boolean {
  return features.some(({ wire }) => (wire as Encoded).push !== undefined)
}

/** For the consumer: what encoders have said of each item, and under which name it comes. Undefined where nothing is pushed. */
export function pushedParams (features: readonly EncoderResult[]): Readonly<Record<string, unknown>> | undefined {
  if (!isPushed(features)) return undefined
  const wires = [...features].sort((a, b) => a.item - b.item).map(({ wire }) => wire as Encoded)
  return {
    ...Object.fromEntries(wires.flatMap(({ key, entry }) => key === undefined ? [] : [[key, entry]])),
    ec_items: wires.map(({ key, push }) => ({ mm_hash: key, transfer_id: push?.transfer }))
  }
}

/** The call to the consumer, at the replica that the features went to. */
export function atReplica (call: Call, features: readonly EncoderResult[]): Call {
  const rank = features.map(({ wire }) => (wire as Encoded).push?.rank).find(rank => rank !== undefined)
  return rank === undefined ? call : { ...call, headers: { ...call.headers, [RANK_HEADER]: String(rank) } }
}

/** Features that no request will take: the consumer frees the memory that it keeps for them. */
export async function releasePushes (leases: readonly LeaseRef[], log: Log): Promise<void> {
  await cancelPushes(leases.flatMap(({ wire }) => (wire as Partial<Encoded>).push ?? []), { abandon: false }, log)
}
