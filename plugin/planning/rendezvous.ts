/**
 * Rendezvous (highest random weight) hashing: every gateway replica sends the same picture to the same encoder with no
 * shared state, and when an encoder comes or goes only its own share of the pictures moves. So with conversations and
 * language models.
 */

/** One node may carry this much more than the average before work spills over from it. */
export const IMBALANCE = 1.25

export const FNV_PRIME = 0x01000193
const FNV_OFFSET = 0x811c9dc5

/** `nodes`, the heaviest for `key` first. Does not change `nodes`. */
export function rank<T extends { readonly id: string }> (key: string, nodes: readonly T[]): T[] {
  return nodes.map(node => ({ node, weight: weight(key, node.id) }))
    .sort((a, b) => b.weight - a.weight || (a.node.id < b.node.id ? -1 : 1))
    .map(({ node }) => node)
}

/** A 32-bit weight of `id` for `key`, evenly spread and the same in every process. */
function weight (key: string, id: string): number {
  return mix(fnv(key, fnv(id, FNV_OFFSET)))
}

function fnv (text: string, seed: number): number {
  let hash = seed
  for (let i = 0; i < text.length; i++) hash = Math.imul(hash ^ text.charCodeAt(i), FNV_PRIME)
  return hash
}

/** murmur3's finaliser: FNV alone leaves the weights of similar ids correlated. */
function mix (hash: number): number {
  hash = Math.imul(hash ^ (hash >>> 16), 0x85ebca6b)
  hash = Math.imul(hash ^ (hash >>> 13), 0xc2b2ae35)
  return (hash ^ (hash >>> 16)) >>> 0
}

/** `nodes` with those that meet `condition` at the end. */
export function last<T> (nodes: readonly T[], condition: (node: T) => boolean): readonly T[] {
  return nodes.some(condition) ? [...nodes.filter(node => !condition(node)), ...nodes.filter(condition)] : nodes
}
