/** Which nodes can share a request between prefill and decode. */
import type { NodeSnapshot, RegistrySnapshot } from '../registry/index.ts'
import { canTransfer, linkedFirst } from './pairs.ts'
import type { Nodes, Pool } from './types.ts'

/** Prompt tokens are an estimate, and a prefill node may hang on a prompt that is too long for it. */
const MARGIN = 1.5

/** Those of the healthy prefill nodes that can take the request and have a decode node to hand it to, or what is missing. */
export function prefillsFor ({ prefills, decodes }: Pool, healthy: Nodes, readyDecodes: Nodes, tokens: number, snapshot: RegistrySnapshot): { readonly nodes: Nodes, readonly missing: string } {
  const without = (missing: string): { nodes: Nodes, missing: string } => ({ nodes: [], missing })
  if (prefills.length === 0) return without('no prefill node')
  if (decodes.length === 0) return without('no decode node')
  if (healthy.length === 0) return without('no healthy prefill node')
  if (readyDecodes.length === 0) return without('no healthy decode node')
  const paired = healthy.filter(node => decodesFor(node, readyDecodes, snapshot).length > 0)
  if (paired.length === 0) return without('no decode node fits a prefill node')
  const fitting = paired.filter(({ info }) => info?.maxPrefillTokens === undefined || tokens * MARGIN <= info.maxPrefillTokens)
  if (fitting.length === 0) return without('prompt too long for the prefill nodes')
  const linked = fitting.filter(node => readyDecodes.some(decode => snapshot.link(node.id, decode.id) === 'linked'))
  return { nodes: linked.length > 0 ? linked : fitting, missing: '' }
}

/** Those of the decode nodes that can take over from P, linked ones first. */
export function decodesFor (prefill: NodeSnapshot, decodes: Nodes, snapshot: RegistrySnapshot): Nodes {
  const fitting = decodes.filter(decode => canTransfer(prefill, decode, snapshot))
  return linkedFirst(fitting, decode => snapshot.link(prefill.id, decode.id))
}

/** Prefill nodes that have failed this request, and those whose every decode node has. */
export function prefillsToAvoid (prefills: Nodes, decodes: Nodes, snapshot: RegistrySnapshot, avoid: ReadonlySet<string>): ReadonlySet<string> {
  if (avoid.size === 0) return avoid
  const stranded = prefills.filter(node => decodesFor(node, decodes, snapshot).every(decode => avoid.has(decode.id)))
  return new Set([...avoid, ...stranded.map(node => node.id)])
}
