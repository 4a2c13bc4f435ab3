import { AdapterError, type Call, type CallSignal, type Stage } from '../../adapters/adapter.ts'
import { abortable } from '../../adapters/abort.ts'
import type { Attributes } from '@opentelemetry/api'
import type { NodeSnapshot, RegistryApi } from '../registry/index.ts'
import type { StageSpanName } from '../../adapters/wire/semconv.ts'
import type { OpenStage, StageSpan } from '../telemetry/spans.ts'
import { verdictOn } from './blame.ts'
import type { Exchange } from './exchange.ts'
import { inquest } from './inquest.ts'

export interface NodeCall<T> {
  readonly node: NodeSnapshot
  readonly stage: Stage
  /** Load on the node, in tokens. */
  readonly tokens: number
  /** The request's id on the node. */
  readonly id: string
  /** Milliseconds. */
  readonly timeout: number
  readonly span: { readonly name: StageSpanName, readonly attributes: Attributes, readonly parent: StageSpan }
  /** Vision tokens that the result has cost. */
  readonly encoded?: ((value: T) => number) | undefined
  /** Gets a result that comes after the call was given up. */
  readonly late: (value: T) => void
}

/**
 * A call to a node that has ended when its result is there: encode and prefill. Counts as load, has a span and a time
 * limit. A call that was given up or has failed is aborted on the node too: its answer may hold a lease that no one has read.
 *
 * @throws what the failure means; see {@link Exchange.failure}
 */
export async function callNode<T> (exchange: Exchange, { node, stage, tokens, id, timeout, span: { name, attributes, parent }, encoded, late }: NodeCall<T>, work: (call: Call, span: OpenStage) => Promise<T>): Promise<T> {
  const limit = exchange.open(timeout)
  const ticket = exchange.core.registry.acquire(node.id, stage, tokens)
  const span = parent.begin(name, attributes)
  try {
    const result = await span.run(() => abortable(work(exchange.call(limit, span, id), span), limit, late))
    if (encoded !== undefined) ticket.encoded(encoded(result))
    ticket.end()
    span.end()
    return result
  } catch (err) {
    let failure = exchange.failure(err, limit, node.id, `${node.adapter.name}.${stage}`)
    if (limit.aborted || (AdapterError.is(failure) && failure.fault === 'node')) exchange.callAside(call => node.adapter.abort(node, id, call))
    ticket.end(failure, verdictOn(failure, stage))
    failure = await inquest(failure, ticket)
    span.end(limit.aborted && !limit.timedOut ? { aborted: true } : { error: failure })
    throw failure
  } finally {
    exchange.shut(limit)
  }
}

/** Makes sure that `to` can pull from `from`. */
export async function link (registry: RegistryApi, from: string, to: string, signal: CallSignal): Promise<void> {
  if (registry.snapshot().link(from, to) !== 'linked') await registry.ensureLink(from, to, signal)
}
