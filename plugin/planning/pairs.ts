/** Which nodes can exchange features or KV blocks. */
import { canExchange, sameFingerprint, type LinkState, type NodeSnapshot, type RegistrySnapshot } from '../registry/index.ts'

/** Can features, or KV blocks, flow from one node to the other, by what both report and by what linking them has shown? */
export function canTransfer (from: NodeSnapshot, to: NodeSnapshot, snapshot: RegistrySnapshot): boolean {
  const link = snapshot.link(from.id, to.id)
  return canExchange(from, to) && sameFingerprint(from, to) && link !== 'refused' && link !== 'none'
}

/** The linked nodes; else those whose link may soon be made; else those whose handshake has failed. */
export function linkedFirst (nodes: readonly NodeSnapshot[], link: (node: NodeSnapshot) => LinkState): readonly NodeSnapshot[] {
  const linked = nodes.filter(node => link(node) === 'linked')
  if (linked.length > 0) return linked
  const pending = nodes.filter(node => link(node) !== 'failed')
  return pending.length > 0 ? pending : nodes
}
