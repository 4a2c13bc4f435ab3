import { AdapterError, type Call, type EncodeJob, type EncoderResult } from '../adapter.ts'
import { requestOk } from '../http/json.ts'
import { isObject, listOf, objectOf, type Json } from '../wire/json.ts'
import { failuresOf } from './failures.ts'
import { pinnedPart, type Pin, type Pins } from './pins.ts'
import { cancelPushes, newPush, pushOrder, type Push, type Receiver } from './push.ts'
import type { Written } from './written.ts'

export const CHAT = '/v1/chat/completions'

/** What an encoder has answered for one item; `EncoderResult.wire`. */
export interface Encoded {
  readonly pin: Pin
  /** The key of its features: the `uuid`, or vLLM's own hash. */
  readonly key?: string | undefined
  /** The shape of the features, in place of pixels. */
  readonly metadata?: Json | undefined
  /** All that the encoder says of it, for `ec_transfer_params` as it came. */
  readonly entry?: Json | undefined
  /** Under way to the consumer. */
  readonly push?: Push | undefined
}

/**
 * One call for the items that the encoder is not `known` to have. Safe to send twice.
 *
 * @param receiver - pushes them there, known or not
 */
export async function encodeVllm (job: EncodeJob, call: Call, pins: Pins, known: Pick<Written, 'has' | 'add'> | undefined, receiver: Receiver | undefined): Promise<EncoderResult[]> {
  const { node, items, body, tenant } = job
  const all = items.map(item => pins.pin(item, body, node.id, tenant))
  const missing = all.filter(({ name }) => known?.has(node, name) !== true)
  const answered = missing.length === 0 ? new Map<Pin, Encoded>() : await (receiver === undefined ? ask(job, missing, call) : askPushed(job, missing, call, receiver))
  for (const { name } of missing) known?.add(node, name)
  return all.map(pin => ({
    item: pin.item.index,
    node: node.id,
    lease: pin.name,
    tokens: pin.item.tokens,
    cached: !answered.has(pin),
    wire: answered.get(pin) ?? { pin } satisfies Encoded
  }))
}

/** When the call fails, the consumer waits for nothing more of it. */
async function askPushed (job: EncodeJob, pins: readonly Pin[], call: Call, receiver: Receiver): Promise<Map<Pin, Encoded>> {
  const pushes = pins.map(() => newPush(receiver))
  try {
    return await ask(job, pins, call, pushes)
  } catch (err) {
    const abandon = AdapterError.is(err) && (err.how === 'unreachable' || err.how === 'cut')
    cancelPushes(pushes, { abandon }, call.log).catch(() => {})
    throw err
  }
}

async function ask ({ node, body }: EncodeJob, pins: readonly Pin[], call: Call, pushes?: readonly Push[]): Promise<Map<Pin, Encoded>> {
  const answer = await requestOk(node, {
    method: 'POST',
    path: CHAT,
    // Before 0.30 an encoder needs max_tokens. It never streams: a stream has no ec_transfer_params.
    slices: body.pick(pins.map(pin => pin.item), { max_tokens: '1', stream: 'false', ...(pushes === undefined ? {} : { ec_transfer_params: pushOrder(pushes) }) }, pins.map(pinnedPart)),
    idempotent: true,
    timeout: 0
  }, call, failuresOf(body))
  return new Map(encodedOf(pins, objectOf(objectOf(answer).ec_transfer_params)).map((one, i) => [one.pin, { ...one, push: pushes?.[i] }]))
}

/** One entry for each key, which names its items by their position; the same picture twice is one entry. */
function encodedOf (pins: readonly Pin[], params: Json): Encoded[] {
  const byItem = new Map<number, Omit<Encoded, 'pin'>>()
  for (const [key, entry] of Object.entries(params)) {
    if (!isObject(entry)) continue
    const { item_indices: indices, metadata } = entry
    for (const index of listOf(indices)) if (typeof index === 'number') byItem.set(index, { key, metadata: isObject(metadata) ? metadata : undefined, entry })
  }
  return pins.map((pin, i) => ({ pin, ...byItem.get(i) }))
}
