import type { RequestBody } from '../../adapters/adapter.ts'
import { usableOf, type NodeSnapshot, type RegistrySnapshot } from '../registry/index.ts'
import { firstByPolicy } from './choice.ts'
import { prefillsFor, prefillsToAvoid } from './disaggregation.ts'
import { encodingFor, orderOf, type Encoding } from './encoders.ts'
import { decodesFor } from './pairs.ts'
import { NO_POOL, poolsOf } from './pools.ts'
import { noWay, unknownModel } from './refusals.ts'
import type { Nodes, Plan, PlanOptions, Refusal } from './types.ts'
import type { RequestView } from './view.ts'

/** A way to serve a request: on a single node, or disaggregated into P and D. */
interface Way {
  /** Nodes that could begin the request: PD (or a D that needs no P), or P. */
  readonly nodes: Nodes
  /** Disaggregated: the decode nodes that may be asked. */
  readonly decodes?: Nodes
  /** Why this way; empty when there is no choice. */
  readonly reason: string
}

/** The last way comes into use only when the nodes of those before it have failed the request. */
const FAILED = 'prefill nodes failed'
const NO_NODES: ReadonlySet<string> = new Set()
/** D gets all KV blocks from P: what it holds of a conversation saves nothing. */
const NO_CONVERSATION = (): undefined => undefined

/**
 * Decides which nodes serve a request, and why. A pure function: the same arguments give the same plan. Finds the ways
 * to serve it, for each way the language models, and for these the encoders. Takes the first way whose nodes have failed
 * neither this request nor another one a moment ago, else one whose nodes have not failed this request, else the first.
 *
 * @param avoid nodes that have failed this request; used only when there are no others
 */
export function planRequest (request: RequestView, snapshot: RegistrySnapshot, options: PlanOptions, avoid: ReadonlySet<string> = NO_NODES): Plan | Refusal {
  const ways = waysFor(request, snapshot, options)
  if ('refused' in ways) return ways
  let [first, doubtful]: Array<Plan | undefined> = []
  let refusal: Refusal | undefined
  for (const way of ways) {
    const plan = planWay(way, request, snapshot, options, avoid)
    if ('refused' in plan) {
      refusal ??= plan
      continue
    }
    first ??= plan
    const { node, prefill = node } = plan
    if (avoid.has(node.id) || avoid.has(prefill.id)) continue
    if (node.load.failing !== true && prefill.load.failing !== true) return plan
    doubtful ??= plan
  }
  return doubtful ?? first ?? refusal!
}

/** The possible ways, the preferred one first; a refusal when there is none. */
function waysFor (request: RequestView, snapshot: RegistrySnapshot, options: PlanOptions): readonly Way[] | Refusal {
  const { disaggregate, disaggregateTokens, panicThreshold } = options.routing
  const { model, singleNode, media, promptTokens = 0 } = request
  const pool = poolsOf(snapshot.nodes).get(model) ?? NO_POOL
  const { hybrids, prefills, decodes } = pool
  if (hybrids.length + prefills.length + decodes.length === 0) return unknownModel(snapshot, model)
  const ready = usableOf(hybrids, 'decode', panicThreshold)
  const single = (reason: string): Way => ({ nodes: ready, reason })
  if (prefills.length + decodes.length === 0) return ready.length > 0 ? [single('')] : noWay(request, pool, options)
  const readyDecodes = usableOf(decodes, 'decode', panicThreshold)
  const { nodes, missing } = prefillsFor(pool, usableOf(prefills, 'prefill', panicThreshold), readyDecodes, promptTokens, snapshot)
  const standalone = (reason: string): Way => ({ nodes: readyDecodes.filter(node => node.info?.standalone === true && (media.length === 0 || node.info.vision === 'full')), reason })
  const disaggregated = (reason: string): Way => ({ nodes, decodes: readyDecodes, reason })

  let ways: Way[]
  if (disaggregate === 'never') ways = [single('disaggregation is off')]
  else if (singleNode !== undefined) ways = singleNode.source === 'request' ? [single(singleNode.what)] : [single(singleNode.what), standalone(singleNode.what)]
  else if (nodes.length === 0) ways = [single(missing), standalone(missing)]
  else if (disaggregate === 'always') ways = [disaggregated('always'), single('always'), standalone(FAILED)]
  else if (ready.length === 0) ways = [disaggregated(hybrids.length === 0 ? 'no node does both' : 'no healthy node does both'), standalone(FAILED)]
  else if (promptTokens >= disaggregateTokens) ways = [disaggregated('long prompt'), single('long prompt'), standalone(FAILED)]
  else ways = [single('short prompt'), disaggregated('short prompt')]
  const possible = ways.filter(way => way.nodes.length > 0)
  return possible.length > 0 ? possible : noWay(request, pool, options, missing)
}

/** The nodes of one way: the language model that begins, the encoders that feed it, and D where it is disaggregated. */
function planWay ({ nodes, decodes, reason: why }: Way, request: RequestView, snapshot: RegistrySnapshot, options: PlanOptions, avoid: ReadonlySet<string>): Plan | Refusal {
  const text = request.media.length === 0
  const encoding = text ? textOnly(request, nodes) : encodingFor(request, nodes, poolsOf(snapshot.nodes).get(request.model)!.encoders, snapshot, options)
  if ('refused' in encoding) return encoding
  // What is new stands before the spread: behind it, it would cost Node.js 20 a microsecond and more.
  const choose = (candidates: Nodes, stage: 'prefill' | 'decode', avoided = avoid, conversation = request.conversation): NodeSnapshot =>
    firstByPolicy(candidates, { stage, ...request, conversation }, options.routing, avoided)
  // The language model is chosen before the encoders: some transports push features to it.
  const first = decodes === undefined
    ? choose(encoding.nodes, 'decode')
    : choose(encoding.nodes, 'prefill', prefillsToAvoid(encoding.nodes, decodes, snapshot, avoid))
  const { order, reason: who } = encoding.encoders.length === 0 ? { order: [], reason: encoding.reason } : orderOf(request, encoding, first, snapshot, options, avoid)
  const callsEncoders = encoding.callEncoders === true
  const encoded = order.length > 0 || callsEncoders
  const reason = [who, why].filter(part => part !== '').join(', ')
  const fallback = order.length > 0 && first.info?.vision === 'full'
  if (decodes === undefined) return { topology: encoded ? 'e-pd' : text ? 'pd' : 'hybrid', reason, node: first, fallback, callsEncoders, order }
  return { topology: encoded ? 'e-p-d' : 'p-d', reason: text ? why : reason, prefill: first, fallback, callsEncoders, order, node: choose(decodesFor(first, decodes, snapshot.link), 'decode', avoid, NO_CONVERSATION) }
}

function textOnly ({ opaque }: RequestView, nodes: Nodes): Encoding {
  const seeing = opaque === true ? nodes.filter(node => node.info?.vision === 'full') : []
  return { nodes: seeing.length > 0 ? seeing : nodes, encoders: [], reason: 'text only' }
}

/** Vision tokens of the media items that the language model encodes. */
export function ownTokens ({ topology, order }: Plan, { media }: RequestBody): number {
  if (topology === 'hybrid') return media.reduce((sum, item) => sum + item.tokens, 0)
  return media.reduce((sum, item) => order[item.index]?.length === 0 ? sum + item.tokens : sum, 0)
}

/** Vision tokens of all media items. */
export function visionTokens ({ media }: RequestBody): number {
  return media.reduce((sum, item) => sum + item.tokens, 0)
}
