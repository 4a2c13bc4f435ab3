import { AdapterError, type EncoderResult, type MediaItem } from '../../adapters/adapter.ts'
import type { Plan, RequestView } from '../planning/index.ts'
import type { NodeSnapshot } from '../registry/index.ts'
import { ATTR, SPAN } from '../../adapters/wire/semconv.ts'
import type { StageSpan } from '../telemetry/spans.ts'
import { againAfter, outcomeOf, type Outcome } from './blame.ts'
import type { Exchange } from './exchange.ts'
import { callNode, link } from './node-call.ts'

/** When PD is told of a request. An encoder that has all pictures cached has answered by then, and telling would cost more than it brings: 8 of 42 ms. */
const TELL_AFTER_MS = 10

/** Every encoder of some item has failed. `last` is why the last one did. */
export class EncodersExhausted extends Error {
  readonly plan: Plan
  readonly failed: ReadonlyMap<string, Outcome>
  readonly last: AdapterError | undefined

  constructor ({ plan, failed, last }: Fanout) {
    super('every encoder has failed', { cause: last })
    this.name = 'EncodersExhausted'
    this.plan = plan
    this.failed = failed
    this.last = last
  }
}

interface Fanout {
  readonly exchange: Exchange
  readonly plan: Plan
  readonly span: StageSpan
  /** @see overlapId */
  readonly overlap: string | undefined
  readonly results: EncoderResult[]
  /** How each encoder has failed. */
  readonly failed: Map<string, Outcome>
  /** Not to be tried, because they failed before this plan. */
  readonly lost: ReadonlySet<string>
  last: AdapterError | undefined
}

/** Encodes all items at the plan's encoders, if it has any; in the plan from there on the language model does, where they fail and it can. @param lost encoders that must not be tried */
export async function encodeStage (exchange: Exchange, plan: Plan, lost?: ReadonlySet<string>): Promise<{ readonly plan: Plan, readonly features: readonly EncoderResult[] }> {
  if (plan.order.length === 0) {
    exchange.leaveEncoders()
    if (!plan.callsEncoders) exchange.core.stats.skipped.add(exchange.request.body.media.length, 'language_model')
    return { plan, features: [] }
  }
  try {
    return { plan, features: await encodeAll(exchange, plan, lost) }
  } catch (err) {
    return { plan: withoutEncoders(exchange, plan, err), features: [] }
  }
}

/** The plan in which the language model encodes by itself, when every encoder has failed. Throws where it can't. */
function withoutEncoders (exchange: Exchange, plan: Plan, err: unknown): Plan {
  if (exchange.cancelled !== undefined || !(err instanceof EncodersExhausted)) throw err
  if (!plan.fallback) throw err
  exchange.held?.release()
  exchange.core.stats.encodeFallbacks++
  exchange.plan = { ...plan, topology: plan.prefill === undefined ? 'hybrid' : 'p-d', reason: 'encoders failed', order: [] }
  return exchange.plan
}

/**
 * Encodes all items over the plan's encoders, one call for each encoder, all in parallel. The items of a call that
 * fails move to their next encoder by hash.
 *
 * @throws EncodersExhausted when an item has no encoder left; any error that is not a node's own fault as it is
 */
async function encodeAll (exchange: Exchange, plan: Plan, lost: ReadonlySet<string> = new Set()): Promise<EncoderResult[]> {
  const { media } = exchange.request.body
  const attributes = { [ATTR.items]: media.length }
  return await exchange.trace.stage(SPAN.encode, attributes, async span => {
    const fanout: Fanout = { exchange, plan, span, overlap: overlapId(exchange, plan), results: [], failed: new Map(), lost, last: undefined }
    const placed = media.filter(item => plan.order[item.index]!.length > 0)
    if (placed.length < media.length) exchange.core.stats.skipped.add(media.length - placed.length, 'language_model')
    const telling = fanout.overlap === undefined ? undefined : setTimeout(tellConsumer, TELL_AFTER_MS, fanout, fanout.overlap)
    try {
      await encodeItems(fanout, placed)
    } finally {
      clearTimeout(telling)
    }
    exchange.encodedBy = media.map(item => fanout.results[item.index]?.node ?? (plan.prefill ?? plan.node).id)
    exchange.leaveEncoders()
    exchange.timing?.encoded()
    const results = fanout.results.filter(result => result !== undefined)
    if (span.recording) {
      const tokens = results.reduce((sum, result) => sum + result.tokens, 0)
      exchange.trace.set({ [ATTR.imageTokens]: tokens })
      span.set({
        [ATTR.encoders]: [...exchange.encodedBy],
        [ATTR.tokens]: tokens,
        [ATTR.cached]: results.filter(result => result.cached).length,
        [ATTR.itemTokens]: results.map(result => result.tokens),
        [ATTR.itemCached]: results.map(result => result.cached)
      })
    }
    return results
  })
}

/**
 * The id of the request at PD, or P, where that may work while encoders do. With other requests it has no time to spare: on
 * shared cores 3 to 18 % fewer requests were served (docs/benchmarks.md).
 */
function overlapId (exchange: Exchange, { prefill, node }: Plan): string | undefined {
  // This request counts already: its plan has reserved the node.
  if (!exchange.core.options.overlap || (prefill ?? node).load.requests > 1) return undefined
  return prefill === undefined ? exchange.callId : exchange.prefillId
}

function tellConsumer ({ exchange, plan: { prefill, node: answers }, span }: Fanout, id: string): void {
  const { path, body, tenant } = exchange.request
  const node = prefill ?? answers
  if (node.adapter.prepare !== undefined) exchange.callAside(async call => { await node.adapter.prepare!({ node, path, body, tenant }, call) }, span, id)
}

async function encodeItems (fanout: Fanout, items: readonly MediaItem[]): Promise<void> {
  const groups = groupByEncoder(fanout, items)
  const calls = [...groups].map(([node, group]) => encodeOrMove(fanout, node, group).catch((err: unknown) => {
    // One item is lost for good: the results of the other calls are of no use.
    fanout.exchange.abortCalls(err)
    throw err
  }))
  const outcomes = await Promise.allSettled(calls)
  const lost = outcomes.find(outcome => outcome.status === 'rejected')
  if (lost !== undefined) throw firstCause(outcomes)
}

/** What ends the request comes before the aborts that it has caused. */
function firstCause (outcomes: ReadonlyArray<PromiseSettledResult<void>>): unknown {
  const reasons = outcomes.flatMap(outcome => outcome.status === 'rejected' ? [outcome.reason as unknown] : [])
  return reasons.find(reason => AdapterError.is(reason) && againAfter(reason, 'encode') === 'no') ?? reasons[0]
}

async function encodeOrMove (fanout: Fanout, node: NodeSnapshot, items: readonly MediaItem[]): Promise<void> {
  try {
    const results = await encodeCall(fanout, node, items)
    fanout.exchange.leases.hold(node.adapter, node, results)
    fanout.exchange.core.stats.encoded(node.id, results.length, results.filter(result => result.cached).length)
    for (const [i, item] of items.entries()) fanout.results[item.index] = results[i]!
  } catch (err) {
    if (!mayMove(err)) throw err
    const { core, log } = fanout.exchange
    log.warn({ err, node: node.id, items: items.length }, 'encode call failed; its items move to the next encoder')
    core.stats.encodeMoves++
    fanout.failed.set(node.id, outcomeOf(err))
    fanout.exchange.avoided.add(node.id)
    fanout.last = err
    await encodeItems(fanout, items)
  }
}

function mayMove (err: unknown): err is AdapterError {
  return AdapterError.is(err) && againAfter(err, 'encode') !== 'no'
}

function groupByEncoder (fanout: Fanout, items: readonly MediaItem[]): Map<NodeSnapshot, MediaItem[]> {
  const { plan, failed, lost } = fanout
  const groups = new Map<NodeSnapshot, MediaItem[]>()
  for (const item of items) {
    const node = plan.order[item.index]?.find(({ id }) => !failed.has(id) && !lost.has(id))
    if (node === undefined) throw new EncodersExhausted(fanout)
    const group = groups.get(node)
    if (group === undefined) groups.set(node, [item])
    else group.push(item)
  }
  return groups
}

async function encodeCall ({ exchange, plan, span, overlap }: Fanout, node: NodeSnapshot, items: readonly MediaItem[]): Promise<EncoderResult[]> {
  const { core, request } = exchange
  const consumer = plan.prefill ?? plan.node
  return await callNode<EncoderResult[]>(exchange, {
    node,
    stage: 'encode',
    tokens: items.reduce((sum, item) => sum + item.tokens, 0),
    // Another one for each call: an encoder may get several of one request, and aborting one must hit that one alone.
    id: `${exchange.callId}.e${++exchange.encodeCalls}`,
    timeout: core.options.timeouts.encode,
    span: { name: SPAN.encodeCall, attributes: { [ATTR.node]: node.id, [ATTR.items]: items.length }, parent: span },
    encoded: results => results.reduce((sum, result, i) => result.cached ? sum : sum + items[i]!.tokens, 0),
    late: results => {
      // Its own leases only: those of another attempt may be in use.
      const leases = results.map(({ lease, wire }) => ({ node, lease, wire }))
      exchange.callAside(call => node.adapter.release(leases, call))
    }
  }, async call => {
    await link(core.registry, node.id, consumer.id, call.signal)
    const results = await node.adapter.encode({ node, items, body: request.body, consumer, tenant: request.tenant, overlap }, call)
    const good = results.filter(isResult)
    if (good.length === items.length && results.length === items.length) return results
    exchange.leases.hold(node.adapter, node, good)
    throw new AdapterError('UNAVAILABLE', `answered ${good.length} results for ${items.length} items`, { node: node.id, how: 'nonsense' })
  })
}

/** An adapter hands on what its node has answered. */
function isResult (result: EncoderResult | null | undefined): boolean {
  return typeof result?.lease === 'string' && Number.isFinite(result.tokens) && result.tokens >= 0
}

/** What the planner is to know of a request with media besides. */
export function mediaView ({ core: { timings }, request: { body, tenant } }: Exchange): Pick<RequestView, 'has' | 'times'> {
  return {
    has: (node, item) => node.adapter.has?.(node, item, body, tenant) === true,
    times: role => timings.of(body.model, role)
  }
}
