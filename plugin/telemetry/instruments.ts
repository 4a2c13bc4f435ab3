/** The gateway's instruments: their names, their bounds, and where the numbers are read that exist without them. */
import type { Attributes, BatchObservableResult, Histogram, Meter, Observable } from '@opentelemetry/api'
import type { Stage } from '../../adapters/adapter.ts'
import { ATTR } from '../../adapters/wire/semconv.ts'
import type { BreakerState, RegistrySnapshot } from '../registry/index.ts'

/** The Prometheus text has `_` for each dot, `_seconds` after times and `_total` after counters. */
export const METRIC = {
  requestDuration: 'gen_ai.client.operation.duration',
  timeToFirstChunk: 'gen_ai.client.operation.time_to_first_chunk',
  timePerOutputToken: 'gen_ai.server.time_per_output_token',
  stageDuration: 'epd.stage.duration',
  requests: 'epd.requests',
  requestsInFlight: 'epd.requests.in_flight',
  retries: 'epd.retries',
  encodeMoves: 'epd.encode.moves',
  encodeFallbacks: 'epd.encode.fallbacks',
  encodedItems: 'epd.gateway.encoded_items',
  cacheHits: 'epd.gateway.encoder_cache_hits',
  migratedBytes: 'epd.gateway.migrated_bytes',
  admissionTokens: 'epd.admission.vision_tokens',
  admissionWaiting: 'epd.admission.waiting',
  admissionRefused: 'epd.admission.refused',
  nodeUp: 'epd.node.up',
  nodeRequests: 'epd.node.requests_in_flight',
  nodeTokens: 'epd.node.vision_tokens',
  breakerState: 'epd.breaker.state',
  linkUp: 'epd.link.up'
} as const

export type MetricName = typeof METRIC[keyof typeof METRIC]

const DURATION_BOUNDS = [0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92]

/** Bucket bounds of the histograms, in seconds: those of the GenAI conventions; stages begin lower, as a cached encode takes a millisecond. */
export const BOUNDS = {
  [METRIC.requestDuration]: DURATION_BOUNDS,
  [METRIC.timeToFirstChunk]: DURATION_BOUNDS,
  [METRIC.timePerOutputToken]: [0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5],
  [METRIC.stageDuration]: [0.001, 0.0025, 0.005, ...DURATION_BOUNDS]
} as const satisfies Partial<Record<MetricName, readonly number[]>>

/** What is counted elsewhere in plain numbers, and read at collection. */
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

/** The instruments of one meter. */
export class Instruments {
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
