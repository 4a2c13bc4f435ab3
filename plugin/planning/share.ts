import type { NodeSnapshot, RegistrySnapshot } from '../registry/index.ts'
import type { Plan } from './types.ts'
import type { RequestView } from './view.ts'

/** A queue must be so much longer than the language model's own before a picture leaves it: each change of place costs a cache hit. */
const MARGIN = 1.25

/**
 * Leaves to the language model the items that it would have encoded before their encoder begins with them: an encoder
 * never holds requests up while the other card has time. 32 requests of 1 to 4 pictures, 12 at a time, before simulated servers
 * of one rate take 17 s instead of 28 s. Items that an encoder has already stay. What a language model
 * generates slows its vision tower, so that its rate is divided by the requests that it works on.
 *
 * @param order encoders for each item, by affinity
 * @returns `order` with an empty list for each item that stays with the language model
 */
export function shareItems ({ media, has }: RequestView, order: Plan['order'], node: NodeSnapshot, snapshot: RegistrySnapshot): Plan['order'] {
  const first = order.map(([encoder]) => encoder!)
  if (node.info?.vision !== 'full' || !first.every(encoder => snapshot.byId.get(encoder.id)?.links.get(node.id)?.link?.mixes === true)) return order
  const measured = first.flatMap(({ load }) => load.rate ?? [])
  // Nothing is known of an encoder's queue before its first answer.
  if (measured.length === 0) return order
  const average = measured.reduce((sum, rate) => sum + rate, 0) / measured.length
  const own = (node.load.rate ?? average) / (1 + (node.load.active ?? node.load.requests))
  let queued = node.load.tokens
  return order.map((encoders, i) => {
    const encoder = encoders[0]!
    const item = media[i]!
    if (has?.(encoder, item) === true) return encoders
    // In seconds. What this request adds to the encoder's queue delays no one before it.
    const wait = encoder.load.tokens / (encoder.load.rate ?? average)
    if (wait <= MARGIN * (queued + item.tokens) / own) return encoders
    queued += item.tokens
    return []
  })
}
