import type { Attributes, BatchObservableResult, Histogram, Meter, Observable } from '@opentelemetry/api'
import { AdapterError, type Stage } from '../../adapters/adapter.ts'
import type { BreakerState, RegistrySnapshot } from '../registry/index.ts'
import { ATTR, BOUNDS, METRIC, TRACER_NAME, type MetricName } from '../../adapters/wire/semconv.ts'

/** What is counted elsewhere in plain numbers, and read when somebody collects. */
export interface MetricsSource {
  readonly inFlight: number
  readonly stats: {
    readonly retries: number
    readonly encodeMoves: number
    readonly encodeFallbacks: number
    requests (): ReadonlyArray<{ readonly plan: string, readonly outcome: string, readonly count: number }>
    encoders (): ReadonlyArray<{ readonly node: string, readonly items: number, readonly cached: number }>
    links (): ReadonlyArray<{ readonly from: string, readonly to: string, readonly bytes: number }>
  }
  readonly admission: { readonly stats: { readonly inFlight: number, readonly waiting: number, readonly refused: number } }
  readonly registry: { snapshot (): RegistrySnapshot }
}

/** One request that is over. Times in seconds. */
export interface RequestFacts {
  readonly operation: string
  /** Of a known model only: a client's own invention would become a time series for each. */
  readonly model: string | undefined
  readonly topology: string
  readonly seconds: number
  /** Undefined when it ended well or the client left. */
  readonly errorType?: string | undefined
  /** Streams only. */
  readonly firstChunk?: number | undefined
  /** Mean of the tokens after the first, where the answer told how many there were. */
  readonly perToken?: number | undefined
}

const BREAKER: Readonly<Record<BreakerState, number>> = { closed: 0, 'half-open': 1, open: 2 }
const STAGES: readonly Stage[] = ['encode', 'prefill', 'decode']

type Observe = (instrument: Observable, value: number, attributes?: Attributes) => void
type Read = (source: MetricsSource, observe: (value: number, attributes?: Attributes) => void) => void

interface Observed { readonly name: MetricName, readonly kind: 'counter' | 'gauge', readonly help: string, readonly unit?: string, readonly read: Read }

const eachNode = (value: (node: RegistrySnapshot['nodes'][number]) => number): Read => ({ registry }, observe) => {
  for (const node of registry.snapshot().nodes) observe(value(node), { [ATTR.node]: node.id, [ATTR.role]: node.role })
}

/** Everything that is a number already: it costs a request nothing. */
const OBSERVED: readonly Observed[] = [
  { name: METRIC.requests, kind: 'counter', help: 'Requests served, by plan and outcome.', read: ({ stats }, observe) => { for (const { plan, outcome, count } of stats.requests()) observe(count, { [ATTR.topology]: plan, [ATTR.outcome]: outcome }) } },
  { name: METRIC.requestsInFlight, kind: 'gauge', help: 'Requests being served.', read: (source, observe) => { observe(source.inFlight) } },
  { name: METRIC.retries, kind: 'counter', help: 'Plans tried again after a node failed before the first byte.', read: ({ stats }, observe) => { observe(stats.retries) } },
  { name: METRIC.encodeMoves, kind: 'counter', help: 'Encode calls that failed and moved to the next encoder.', read: ({ stats }, observe) => { observe(stats.encodeMoves) } },
  { name: METRIC.encodeFallbacks, kind: 'counter', help: 'Requests encoded by the language model because every encoder failed.', read: ({ stats }, observe) => { observe(stats.encodeFallbacks) } },
  { name: METRIC.encodedItems, kind: 'counter', help: 'Media items encoders have answered for.', read: ({ stats }, observe) => { for (const { node, items } of stats.encoders()) observe(items, { [ATTR.node]: node }) } },
  { name: METRIC.cacheHits, kind: 'counter', help: 'Of those, the ones an encoder had already.', read: ({ stats }, observe) => { for (const { node, cached } of stats.encoders()) observe(cached, { [ATTR.node]: node }) } },
  { name: METRIC.migratedBytes, kind: 'counter', unit: 'By', help: 'Bytes pulled over a link, as the spans of the engines tell: of sampled requests.', read: ({ stats }, observe) => { for (const { from, to, bytes } of stats.links()) observe(bytes, { [ATTR.peer]: from, [ATTR.node]: to }) } },
  { name: METRIC.admissionTokens, kind: 'gauge', help: 'Vision tokens admitted and not yet done.', read: ({ admission }, observe) => { observe(admission.stats.inFlight) } },
  { name: METRIC.admissionWaiting, kind: 'gauge', help: 'Requests waiting for admission.', read: ({ admission }, observe) => { observe(admission.stats.waiting) } },
  { name: METRIC.admissionRefused, kind: 'counter', help: 'Requests turned away with 429.', read: ({ admission }, observe) => { observe(admission.stats.refused) } },
  { name: METRIC.nodeUp, kind: 'gauge', help: '1 when the node is healthy.', read: eachNode(node => node.state === 'healthy' ? 1 : 0) },
  { name: METRIC.nodeRequests, kind: 'gauge', help: 'Calls in flight at the node.', read: eachNode(node => node.load.requests) },
  { name: METRIC.nodeTokens, kind: 'gauge', help: 'Vision tokens in flight at the node; at a prefill node, estimated prompt tokens.', read: eachNode(node => node.load.tokens) },
  { name: METRIC.breakerState, kind: 'gauge', help: 'Circuit breaker of a node for a stage: 0 closed, 1 half-open, 2 open.', read: breakers },
  { name: METRIC.linkUp, kind: 'gauge', help: '1 when two nodes that exchange features or KV blocks are linked.', read: links }
]

function breakers ({ registry }: MetricsSource, observe: (value: number, attributes: Attributes) => void): void {
  for (const node of registry.snapshot().nodes) {
    for (const stage of STAGES) observe(BREAKER[node.breakers[stage]], { [ATTR.node]: node.id, [ATTR.stage]: stage })
  }
}

function links ({ registry }: MetricsSource, observe: (value: number, attributes: Attributes) => void): void {
  for (const node of registry.snapshot().nodes) {
    for (const link of node.links.values()) {
      if (link.from === node.id) observe(link.state === 'linked' ? 1 : 0, { [ATTR.peer]: link.from, [ATTR.node]: link.to })
    }
  }
}

/**
 * The gateway's metrics by the OpenTelemetry API. Most are numbers read at collection; a request records its histograms.
 * Every meter gets them: the gateway's own for GET /metrics, and that of an SDK the application may have (a no-op
 * without).
 */
export class GatewayMetrics {
  readonly #meters: readonly Instruments[]

  constructor (meters: readonly Meter[], source: MetricsSource) {
    this.#meters = meters.map(meter => new Instruments(meter, source))
  }

  request ({ operation, model, topology, errorType, seconds, firstChunk, perToken }: RequestFacts): void {
    const attributes: Attributes = {
      [ATTR.operation]: operation,
      [ATTR.provider]: TRACER_NAME,
      ...(model === undefined ? {} : { [ATTR.requestModel]: model }),
      [ATTR.topology]: topology,
      ...(errorType === undefined ? {} : { [ATTR.errorType]: errorType })
    }
    for (const { durations, firstChunks, perTokens } of this.#meters) {
      durations.record(seconds, attributes)
      if (firstChunk !== undefined) firstChunks.record(firstChunk, attributes)
      if (perToken !== undefined) perTokens.record(perToken, attributes)
    }
  }

  /** A node's use for a stage is over. @param error undefined when it went well */
  stage (node: string, stage: Stage, seconds: number, error: unknown): void {
    const attributes = { [ATTR.stage]: stage, [ATTR.node]: node, [ATTR.outcome]: outcomeOf(error) }
    for (const { stages } of this.#meters) stages.record(seconds, attributes)
  }

  close (): void {
    for (const meter of this.#meters) meter.close()
  }
}

class Instruments {
  readonly durations: Histogram
  readonly firstChunks: Histogram
  readonly perTokens: Histogram
  readonly stages: Histogram
  readonly #stop: () => void

  constructor (meter: Meter, source: MetricsSource) {
    const seconds = (name: keyof typeof BOUNDS, description: string): Histogram =>
      meter.createHistogram(name, { unit: 's', description, advice: { explicitBucketBoundaries: [...BOUNDS[name]] } })
    this.durations = seconds(METRIC.requestDuration, 'Whole requests, to the last byte of the answer.')
    this.firstChunks = seconds(METRIC.timeToFirstChunk, 'Arrival of the request to the first byte of its stream.')
    this.perTokens = seconds(METRIC.timePerOutputToken, 'Mean time of a token after the first, of streams that tell their usage.')
    this.stages = seconds(METRIC.stageDuration, 'Calls to nodes by stage, node and outcome.')
    this.#stop = observing(meter, source)
  }

  close (): void {
    this.#stop()
  }
}

function observing (meter: Meter, source: MetricsSource): () => void {
  const instruments = OBSERVED.map(({ name, kind, help, unit }) => {
    const options = { description: help, ...(unit === undefined ? {} : { unit }) }
    return kind === 'counter' ? meter.createObservableCounter(name, options) : meter.createObservableGauge(name, options)
  })
  const collect = (result: BatchObservableResult): void => {
    const observe: Observe = (instrument, value, attributes) => { result.observe(instrument, value, attributes) }
    for (const [i, { read }] of OBSERVED.entries()) read(source, (value, attributes) => { observe(instruments[i]!, value, attributes) })
  }
  meter.addBatchObservableCallback(collect, instruments)
  return () => { meter.removeBatchObservableCallback(collect, instruments) }
}

/** A call that was aborted tells nothing of the node. */
function outcomeOf (error: unknown): string {
  if (error === undefined) return 'ok'
  return AdapterError.is(error) ? error.code.toLowerCase() : 'aborted'
}
