/** Which nodes can exchange features or KV blocks. It changes with the snapshot only. */
import { canExchange, remembered, sameFingerprint, type LinkState, type NodeSnapshot, type RegistrySnapshot } from '../registry/index.ts'
import type { Nodes } from './types.ts'

type LinkOf = RegistrySnapshot['link']
/** Of the link between a node and one that it gives to, or gets from; `none` also where what both report keeps them apart. */
type State = (node: NodeSnapshot, other: NodeSnapshot, link: LinkOf) => LinkState

const given: State = (from, to, link) => canExchange(from, to) && sameFingerprint(from, to) ? link(from.id, to.id) : 'none'
const got: State = (to, from, link) => given(from, to, link)

/** Those of the encoders that can feed a node, linked ones first. */
export const encodersFor = partners(got)
/** Those of the decode nodes that can take over from a P, linked ones first. */
export const decodesFor = partners(given)
/** Those of the language models that encoders can feed. */
export const fedBy = partnered(got)
/** Those of the prefill nodes that can hand on to decode nodes. */
export const handingTo = partnered(given)

/** Linked ones; else those whose link may soon be made; else those whose handshake has failed. */
function partners (stateOf: State): (node: NodeSnapshot, others: Nodes, link: LinkOf) => Nodes {
  return remembered((node, others, link) => {
    const states = others.map(other => stateOf(node, other, link))
    const best = (['linked', 'linking', 'failed'] as const).find(state => states.includes(state))
    return others.filter((_other, i) => states[i] === best)
  })
}

/** Nodes that have a partner among the others, and those of them that are linked with one: a handshake under way may have failed many times before. */
function partnered (stateOf: State): (nodes: Nodes, others: Nodes, link: LinkOf) => { readonly all: Nodes, readonly linked: Nodes } {
  return remembered((nodes, others, link) => {
    const linked = nodes.filter(node => others.some(other => stateOf(node, other, link) === 'linked'))
    const all = linked.length === nodes.length ? nodes : nodes.filter(node => others.some(other => !['none', 'refused'].includes(stateOf(node, other, link))))
    return { all, linked }
  })
}
