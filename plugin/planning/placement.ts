import type { MediaItem } from '../../adapters/adapter.ts'
import type { NodeSnapshot } from '../registry/index.ts'
import { rank } from './rendezvous.ts'

/** An encoder may carry this much more than the average before items spill over from it. */
const IMBALANCE = 1.25

/**
 * For each item, encoders in the order of its own hash. An encoder that is overloaded steps back behind the others: it
 * has more than `bound` vision tokens in flight, this request's own included, and clearly more than the average. Below
 * the bound affinity wins: meeting cached features saves more than an even spread gains.
 */
export function place (items: readonly MediaItem[], nodes: readonly NodeSnapshot[], bound: number, avoid: ReadonlySet<string>): NodeSnapshot[][] {
  const load = new Map(nodes.map(node => [node.id, node.load.tokens]))
  let total = 0
  for (const tokens of load.values()) total += tokens
  return items.map(item => {
    total += item.tokens
    const limit = Math.max(bound, IMBALANCE * total / nodes.length)
    const over = (node: NodeSnapshot): boolean => avoid.has(node.id) || load.get(node.id)! + item.tokens > limit
    const ranked = rank(item.routeKey, nodes)
    const order = ranked.some(over) ? [...ranked.filter(node => !over(node)), ...ranked.filter(over)] : ranked
    const first = order[0]!
    load.set(first.id, load.get(first.id)! + item.tokens)
    return order
  })
}

/** Is every encoder at its bound? */
export function saturated (nodes: readonly NodeSnapshot[], bound: number): boolean {
  return nodes.every(node => node.load.tokens >= bound)
}
