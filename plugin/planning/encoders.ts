/** Who encodes the media items of a request, and in which order its encoders are tried. */
import { usableOf, type NodeSnapshot, type RegistrySnapshot } from '../registry/index.ts'
import { canTransfer, linkedFirst } from './pairs.ts'
import { byPolicy } from './policy.ts'
import { IMBALANCE, last, rank } from './rendezvous.ts'
import type { RequestView } from './request.ts'
import { shareItems } from './share.ts'
import { bypassByTimes, explores, isMeasured } from './stage-times.ts'
import type { Plan, PlanOptions, Refusal } from './types.ts'

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

/** @param nodes that could prefill the request */
export function encodingFor ({ model, media, times }: RequestView, nodes: readonly NodeSnapshot[], snapshot: RegistrySnapshot, options: PlanOptions): Encoding | Refusal {
  const { encoderTokens, smallItem, panicThreshold } = options.routing
  const unencodable = media.find(item => item.unencodable !== undefined)?.unencodable
  const known = snapshot.nodes.filter(node => node.role === 'encoder' && node.models.includes(model))
  const encoders = usableOf(known, 'encode', panicThreshold)
  const seeing = nodes.filter(node => node.info?.vision === 'full')
  const fed = nodes.filter(node => encoders.some(encoder => canTransfer(encoder, node, snapshot)))
  const itself = (reason: string): Encoding => ({ nodes: seeing, encoders: [], reason })
  const pushing = snapshot.nodes.filter(({ info }) => info?.produces.some(format => format.startsWith(PUSHED)))
  const callers = pushing.length === 0 ? [] : nodes.filter(node => usableOf(pushing.filter(encoder => pushesTo(encoder, node, model)), 'encode', panicThreshold).length > 0)
  if (callers.length > 0) return { nodes: callers, encoders: [], reason: 'the language model calls encoders', callEncoders: true }

  if (fed.length === 0 || unencodable !== undefined) {
    const reason = unencodable ?? (known.length === 0 ? 'no encoder' : encoders.length === 0 ? 'no healthy encoder' : 'no encoder fits the node')
    return seeing.length > 0 ? itself(reason) : { refused: 'EPD_ERR_NO_ENCODER', reason }
  }
  if (options.bypass === 'auto' && seeing.length > 0) {
    const known = times?.(nodes[0]!.role)
    const learned = known !== undefined && (isMeasured(known) || explores(known))
    if (!learned && media.every(item => item.tokens <= smallItem)) return itself('small items')
    if (encoders.every(node => node.load.tokens >= encoderTokens)) return itself('encoders saturated')
  }
  // A handshake under way may have failed many times before: linked nodes come first, whatever their load.
  const linked = fed.filter(node => encoders.some(encoder => snapshot.link(encoder.id, node.id) === 'linked'))
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
  const fitting = linkedFirst(encoders.filter(encoder => canTransfer(encoder, node, snapshot)), encoder => snapshot.link(encoder.id, node.id))
  const load = new Map(fitting.map(encoder => [encoder.id, encoder.load.tokens]))
  let total = fitting.reduce((sum, encoder) => sum + encoder.load.tokens, 0)
  return request.media.map(item => {
    total += item.tokens
    const limit = Math.max(routing.encoderTokens, IMBALANCE * total / fitting.length)
    const candidates = last(rank(item.routeKey, fitting), ({ id }) => load.get(id)! + item.tokens > limit)
    const order = byPolicy(candidates, { ...request, stage: 'encode', item }, routing, avoid)
    const first = order[0]!.id
    load.set(first, load.get(first)! + item.tokens)
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
