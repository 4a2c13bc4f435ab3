import { AdapterError, type EncoderResult, type Handoff } from '../../adapters/adapter.ts'
import { promptTokens, type Plan } from '../planning/index.ts'
import { ATTR, SPAN } from '../../adapters/wire/semconv.ts'
import { againAfter } from './blame.ts'
import type { Exchange } from './exchange.ts'
import { callNode, link } from './node-call.ts'
import { avoidNode, blameProducer } from './setback.ts'

/**
 * Has P compute the prompt for D. The link is made first, so that no KV blocks wait for it. The exchange holds the
 * hand-off's lease from here on.
 */
export async function prefillStage (exchange: Exchange, plan: Plan, features: readonly EncoderResult[]): Promise<Handoff> {
  const { core, request: { body, path, tenant }, trace } = exchange
  const node = plan.prefill!
  const { id, adapter } = node
  try {
    const handoff = await callNode<Handoff>(exchange, {
      node,
      stage: 'prefill',
      tokens: promptTokens(body),
      id: exchange.prefillId,
      timeout: core.options.timeouts.prefill,
      span: { name: SPAN.prefill, attributes: { [ATTR.node]: id }, parent: trace },
      late: ({ lease, wire }) => { exchange.callAside(call => adapter.release([{ node, lease, wire }], call)) }
    }, async (call, span) => {
      await link(exchange.core.registry, id, plan.node.id, call.signal)
      const handoff = await adapter.prefill({ node, decode: plan.node, path, body, features, tenant }, call)
      const { tokens, cached } = handoff
      span.set({ ...(tokens === undefined ? {} : { [ATTR.tokens]: tokens }), ...(cached === undefined ? {} : { [ATTR.cached]: cached }) })
      return handoff
    })
    exchange.leases.holdHandoff(adapter, node, handoff)
    exchange.timing?.begun()
    // Its vision work is done.
    exchange.leave()
    return handoff
  } catch (err) {
    if (AdapterError.is(err)) noteFailure(exchange, plan, features, err)
    throw err
  }
}

function noteFailure (exchange: Exchange, { prefill, node }: Plan, features: readonly EncoderResult[], failure: AdapterError): void {
  const { registry } = exchange.core
  const { id } = prefill!
  if (failure.singleNode) exchange.singleNode ??= { what: 'not to be shared by two nodes', source: 'attempt' }
  else if (failure.code !== 'FEATURES_GONE' && againAfter(failure, 'prefill') !== 'no') avoidNode(exchange, id, failure, 'prefill')
  blameProducer(exchange, failure, 'encode')
  if (failure.fault === 'pair' && registry.snapshot().link(id, node.id) === 'linked') registry.refuseLinks(id, failure.message)
  if (failure.code === 'FEATURES_GONE' && failure.unlinked) for (const encoder of new Set(features.map(feature => feature.node))) registry.linkLost(encoder, id)
}
