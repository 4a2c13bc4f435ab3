/**
 * Rendezvous (highest random weight) hashing: every gateway replica sends the same picture to the same encoder with no
 * shared state, and when an encoder comes or goes only its own share of the pictures moves. So with conversations and
 * language models.
 */
import { remembered } from '../registry/remembered.ts'

/** One node may carry this much more than the average before work spills over from it. */
export const IMBALANCE = 1.25

const FNV_PRIME = 0x01000193
const FNV_OFFSET = 0x811c9dc5

interface Named { readonly id: string }

const seedsOf = remembered((nodes: readonly Named[]) => Uint32Array.from(nodes, ({ id }) => mix(fnv(id))))
const PLACES = 2 ** 20
const MOST = 2 ** 32 - 1

/** `nodes`, the heaviest for `key` first. Does not change `nodes`. */
export function rank<T extends Named> (key: string, nodes: readonly T[]): T[] {
  const hash = fnv(key)
  // A weight and a place in the list are one number: these sort four times as fast as pairs, and as integers twice as fast again.
  const order = new Float64Array(nodes.length)
  seedsOf(nodes).forEach((seed, place) => { order[place] = (MOST - mix(hash ^ seed)) * PLACES + place })
  new BigUint64Array(order.buffer).sort()
  return nodes.map((_node, i) => nodes[order[i]! - Math.floor(order[i]! / PLACES) * PLACES]!)
}

/** The heaviest for `key` of those that fit, of all where none does. */
export function heaviest<T extends Named> (key: string, nodes: readonly T[], fits: (node: T) => boolean): T {
  const hash = fnv(key)
  const seeds = seedsOf(nodes)
  let [first, most, fitting, mostFitting] = [0, -1, -1, -1]
  for (let i = 0; i < seeds.length; i++) {
    const found = mix(hash ^ seeds[i]!)
    if (found > most) [first, most] = [i, found]
    if (found > mostFitting && fits(nodes[i]!)) [fitting, mostFitting] = [i, found]
  }
  return nodes[fitting === -1 ? first : fitting]!
}

function fnv (text: string): number {
  let hash = FNV_OFFSET
  for (let i = 0; i < text.length; i++) hash = Math.imul(hash ^ text.charCodeAt(i), FNV_PRIME)
  return hash
}

/** murmur3's finaliser, 32 bits evenly spread: FNV alone leaves the weights of similar ids correlated. */
function mix (hash: number): number {
  hash = Math.imul(hash ^ (hash >>> 16), 0x85ebca6b)
  hash = Math.imul(hash ^ (hash >>> 13), 0xc2b2ae35)
  return (hash ^ (hash >>> 16)) >>> 0
}

/** `nodes` with those that meet `condition` at the end. */
export function last<T> (nodes: readonly T[], condition: (node: T) => boolean): readonly T[] {
  return nodes.some(condition) ? [...nodes.filter(node => !condition(node)), ...nodes.filter(condition)] : nodes
}
