/** Which nodes can share a request between prefill and decode. */
import { those, type NodeSnapshot, type RegistrySnapshot } from '../registry/index.ts'
import { decodesFor, handingTo } from './pairs.ts'
import type { Nodes, Pool } from './types.ts'

/** Prompt tokens are an estimate, and a prefill node may hang on a prompt that is too long for it. */
const MARGIN = 1.5

/** Those of the healthy prefill nodes that can take the request and have a decode node to hand it to, or what is missing. */
export function prefillsFor ({ prefills, decodes }: Pool, healthy: Nodes, readyDecodes: Nodes, tokens: number, { link }: RegistrySnapshot): { readonly nodes: Nodes, readonly missing: string } {
  const without = (missing: string): { nodes: Nodes, missing: string } => ({ nodes: [], missing })
  if (prefills.length === 0) return without('no prefill node')
  if (decodes.length === 0) return without('no decode node')
  if (healthy.length === 0) return without('no healthy prefill node')
  if (readyDecodes.length === 0) return without('no healthy decode node')
  const { all, linked } = handingTo(healthy, readyDecodes, link)
  if (all.length === 0) return without('no decode node fits a prefill node')
  const fits = ({ info }: NodeSnapshot): boolean => info?.maxPrefillTokens === undefined || tokens * MARGIN <= info.maxPrefillTokens
  const fitting = those(all, fits)
  if (fitting.length === 0) return without('prompt too long for the prefill nodes')
  const best = those(linked, fits)
  return { nodes: best.length > 0 ? best : fitting, missing: '' }
}

/** Prefill nodes that have failed this request, and those whose every decode node has. */
export function prefillsToAvoid (prefills: Nodes, decodes: Nodes, { link }: RegistrySnapshot, avoid: ReadonlySet<string>): ReadonlySet<string> {
  if (avoid.size === 0) return avoid
  const stranded = prefills.filter(node => decodesFor(node, decodes, link).every(decode => avoid.has(decode.id)))
  return new Set([...avoid, ...stranded.map(node => node.id)])
}
