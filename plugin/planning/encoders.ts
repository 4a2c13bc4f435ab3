/** Who encodes the media items of a request, and in which order its encoders are tried. */
import { remembered, usableOf, type NodeSnapshot, type RegistrySnapshot } from '../registry/index.ts'
import { encodersFor, fedBy } from './pairs.ts'
import { byPolicy } from './policy.ts'
import { IMBALANCE, last, rank } from './rendezvous.ts'
import { shareItems } from './share.ts'
import { bypassByTimes, explores, isMeasured } from './stage-times.ts'
import type { Nodes, Plan, PlanOptions, Refusal } from './types.ts'
import type { RequestView } from './view.ts'

/** The language models that fit, and the encoders that could feed them; without encoders they encode themselves. */
export interface Encoding {
  readonly nodes: readonly NodeSnapshot[]
  readonly encoders: readonly NodeSnapshot[]
  readonly reason: string
  /** They call encoders by themselves, through this gateway. */
  readonly callEncoders?: boolean
}

/** Formats that an encoder sends to the language model that asks for them: the two are not linked. */
const PUSHED = 'push:'

const pushingOf = remembered((nodes: Nodes) => nodes.filter(({ info }) => info?.produces.some(format => format.startsWith(PUSHED))))
const callersOf = remembered((nodes: Nodes, pushing: Nodes, model: string) => nodes.filter(node => pushing.some(encoder => encoder.state === 'healthy' && pushesTo(encoder, node, model))))
const seeingOf = remembered((nodes: Nodes) => nodes.filter(node => node.info?.vision === 'full'))

/** @param nodes that could prefill the request @param known the encoders of its model */
export function encodingFor ({ media, model, times }: RequestView, nodes: Nodes, known: Nodes, snapshot: RegistrySnapshot, options: PlanOptions): Encoding | Refusal {
  const { encoderTokens, smallItem, panicThreshold } = options.routing
  const unencodable = media.find(item => item.unencodable !== undefined)?.unencodable
  const encoders = usableOf(known, 'encode', panicThreshold)
  const seeing = seeingOf(nodes)
  const { all: fed, linked } = fedBy(nodes, encoders, snapshot.link)
  const itself = (reason: string): Encoding => ({ nodes: seeing, encoders: [], reason })
  const callers = callersOf(nodes, pushingOf(snapshot.nodes), model)
  if (callers.length > 0) return { nodes: callers, encoders: [], reason: 'the language model calls encoders', callEncoders: true }

  if (fed.length === 0 || unencodable !== undefined) {
    const reason = unencodable ?? (known.length === 0 ? 'no encoder' : encoders.length === 0 ? 'no healthy encoder' : 'no encoder fits the node')
    return seeing.length > 0 ? itself(reason) : { refused: 'EPD_ERR_NO_ENCODER', reason }
  }
  if (options.bypass === 'auto' && seeing.length > 0) {
    const measured = times?.(nodes[0]!.role)
    const learned = measured !== undefined && (isMeasured(measured) || explores(measured))
    if (!learned && media.every(item => item.tokens <= smallItem)) return itself('small items')
    if (encoders.every(node => node.load.tokens >= encoderTokens)) return itself('encoders saturated')
  }
  // Linked nodes come first, whatever their load.
  return { nodes: linked.length > 0 ? linked : fed, encoders, reason: '' }
}

function pushesTo (encoder: NodeSnapshot, node: NodeSnapshot, model: string): boolean {
  if (encoder.models.length > 0 && !encoder.models.includes(model)) return false
  return encoder.info?.produces.some(format => format.startsWith(PUSHED) && node.info?.accepts.includes(format)) === true
}

/**
 * For each item, the encoders that can feed `node`, by rendezvous hash of its route key. An overloaded encoder moves
 * behind the others: it has more than `encoderTokens` vision tokens in flight, this request's own included, and clearly
 * more than the average. Below the bound affinity wins: finding cached features saves more than an even spread gains.
 */
function placeItems (request: RequestView, encoders: readonly NodeSnapshot[], node: NodeSnapshot, snapshot: RegistrySnapshot, { routing }: PlanOptions, avoid: ReadonlySet<string>): Plan['order'] {
  const fitting = encodersFor(node, encoders, snapshot.link)
  /** What this request adds to them. */
  const added = new Map<NodeSnapshot, number>()
  const load = (encoder: NodeSnapshot): number => encoder.load.tokens + (added.get(encoder) ?? 0)
  let total = fitting.reduce((sum, encoder) => sum + encoder.load.tokens, 0)
  return request.media.map(item => {
    total += item.tokens
    const limit = Math.max(routing.encoderTokens, IMBALANCE * total / fitting.length)
    const candidates = last(rank(item.routeKey, fitting), encoder => load(encoder) + item.tokens > limit)
    const order = byPolicy(candidates, { stage: 'encode', item, ...request }, routing, avoid)
    added.set(order[0]!, (added.get(order[0]!) ?? 0) + item.tokens)
    return order
  })
}

/** The encoders of each item, of those that could feed `node`, and why; none where `node` encodes all of them. */
export function orderOf (request: RequestView, { encoders }: Encoding, node: NodeSnapshot, snapshot: RegistrySnapshot, options: PlanOptions, avoid: ReadonlySet<string>): { readonly order: Plan['order'], readonly reason: string } {
  const placed = placeItems(request, encoders, node, snapshot, options, avoid)
  if (options.bypass !== 'auto') return { order: placed, reason: spread(placed) }
  const small = request.media.every(item => item.tokens <= options.routing.smallItem)
  const { bypass, reason: why } = node.info?.vision === 'full' ? bypassByTimes(request, placed, node, small) : { bypass: false, reason: '' }
  if (bypass) return { order: [], reason: why === '' ? 'small items' : why }
  const order = shareItems(request, placed, node, snapshot)
  return order.some(some => some.length > 0) ? { order, reason: [spread(order), why].filter(part => part !== '').join(', ') } : { order: [], reason: 'encoders busy' }
}

/** Encoders for one call that a language model makes by itself, by rendezvous hash of `key`; overloaded ones come last, as in {@link placeItems}. */
export function byAffinity (key: string, tokens: number, encoders: readonly NodeSnapshot[], encoderTokens: number): readonly NodeSnapshot[] {
  const total = encoders.reduce((sum, { load }) => sum + load.tokens, tokens)
  const limit = Math.max(encoderTokens, IMBALANCE * total / encoders.length)
  return last(rank(key, encoders), ({ load }) => load.tokens + tokens > limit)
}

/** The reason of a plan: how many items went where. */
function spread (order: Plan['order']): string {
  const encoders = order.flatMap(([first]) => first?.id ?? [])
  const used = new Set(encoders).size
  const own = order.length - encoders.length
  return `${encoders.length} ${encoders.length === 1 ? 'item' : 'items'} on ${used} ${used === 1 ? 'encoder' : 'encoders'}${own > 0 ? `, ${own} on the language model` : ''}`
}
