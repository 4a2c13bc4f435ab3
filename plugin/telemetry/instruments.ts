/** The gateway's instruments: their names, and where the numbers are read. For GET /metrics, and for the application's SDK if it has one. */
import { createNoopMeter, type BatchObservableResult, type Meter } from '@opentelemetry/api'
import type { Stage } from '../../adapters/adapter.ts'
import type { Family } from '../../adapters/wire/exposition.ts'
import { ATTR } from '../../adapters/wire/semconv.ts'
import type { Counter, Histogram, Labels, Sample } from '../../adapters/wire/series.ts'
import type { BreakerState, RegistrySnapshot } from '../registry/index.ts'
import type { GatewayMetrics } from './metrics.ts'

/** In Prometheus `_` for each dot, `_seconds` after times, `_bytes` after bytes, `_total` after counters. */
export const METRIC = {
  requestDuration: 'gen_ai.client.operation.duration',
  timeToFirstChunk: 'gen_ai.client.operation.time_to_first_chunk',
  timeToFirstToken: 'gen_ai.server.time_to_first_token',
  serverDuration: 'gen_ai.server.request.duration',
  timePerOutputToken: 'gen_ai.server.time_per_output_token',
  tokenUsage: 'gen_ai.client.token.usage',
  stageDuration: 'epd.stage.duration',
  requests: 'epd.requests',
  requestsInFlight: 'epd.requests.in_flight',
  requestBytes: 'epd.request.bytes',
  answerBytes: 'epd.answer.bytes',
  retries: 'epd.retries',
  encodeMoves: 'epd.encode.moves',
  encodeFallbacks: 'epd.encode.fallbacks',
  encodeSkipped: 'epd.encode.skipped',
  encodedItems: 'epd.gateway.encoded_items',
  cacheHits: 'epd.gateway.encoder_cache_hits',
  migratedBytes: 'epd.gateway.migrated_bytes',
  admissionTokens: 'epd.admission.vision_tokens',
  admissionWaiting: 'epd.admission.waiting',
  admissionWait: 'epd.admission.wait',
  admissionRefused: 'epd.admission.refused',
  nodeUp: 'epd.node.up',
  nodeRequests: 'epd.node.requests_in_flight',
  nodeTokens: 'epd.node.vision_tokens',
  breakerState: 'epd.breaker.state',
  linkUp: 'epd.link.up',
  keyRequests: 'epd.key.requests',
  keyTokens: 'epd.key.tokens'
} as const

export type MetricName = typeof METRIC[keyof typeof METRIC]

/** Where the numbers are. */
export interface MetricsSource {
  readonly inFlight: number
  readonly metrics: GatewayMetrics
  readonly stats: Readonly<Record<'served' | 'retried' | 'requestBytes' | 'answerBytes' | 'skipped' | 'keyRequests' | 'keyTokens', Counter>> & {
    readonly encodeMoves: number
    readonly encodeFallbacks: number
    encoders (): ReadonlyArray<{ readonly node: string, readonly items: number, readonly cached: number }>
    links (): ReadonlyArray<{ readonly from: string, readonly to: string, readonly bytes: number }>
  }
  readonly admission: { readonly stats: { readonly inFlight: number, readonly waiting: number }, readonly refusals: Counter }
  readonly registry: { snapshot (): RegistrySnapshot }
}

type Read = (source: MetricsSource) => readonly Sample[]

interface Instrument extends Omit<Family, 'read'> {
  readonly name: MetricName
  /** Counters and gauges. */
  readonly read?: Read
  readonly histogram?: (metrics: GatewayMetrics) => Histogram
}

const BREAKER: Readonly<Record<BreakerState, number>> = { closed: 0, 'half-open': 1, open: 2 }
const STAGES: readonly Stage[] = ['encode', 'prefill', 'decode']

/** A counter with labels has no sample before something happens; one with a single label that matters starts at 0, so that a first increase shows. */
const from0 = (counter: Counter, name: string, values: readonly string[]): Sample[] => {
  const samples = counter.samples()
  const missing = values.filter(value => !samples.some(({ labels }) => labels[name] === value))
  return [...samples, ...missing.map(value => ({ labels: { [name]: value }, value: 0 }))]
}

const single = (value: number): Sample[] => [{ labels: {}, value }]

const eachNode = (value: (node: RegistrySnapshot['nodes'][number]) => number) => ({ registry }: MetricsSource): Sample[] =>
  registry.snapshot().nodes.map(node => ({ labels: { [ATTR.node]: node.id, [ATTR.role]: node.role }, value: value(node) }))

const counter = (name: MetricName, help: string, read: Read, unit?: string): Instrument => ({ name, type: 'counter', help, read, unit })
const gauge = (name: MetricName, help: string, read: Read): Instrument => ({ name, type: 'gauge', help, read })
const histogram = (name: MetricName, help: string, histogram: (metrics: GatewayMetrics) => Histogram, unit = 's'): Instrument => ({ name, type: 'histogram', help, histogram, unit })

const INSTRUMENTS: readonly Instrument[] = [
  histogram(METRIC.serverDuration, 'Whole requests, to the last byte of the answer.', metrics => metrics.durations),
  histogram(METRIC.timeToFirstToken, 'Arrival of the request to the first event of its stream.', metrics => metrics.firstTokens),
  histogram(METRIC.timePerOutputToken, 'Mean time of a token after the first, of streams that tell their usage.', metrics => metrics.perTokens),
  histogram(METRIC.tokenUsage, 'Tokens of a request, of answers that tell their usage.', metrics => metrics.tokens, '{token}'),
  histogram(METRIC.requestDuration, 'The same as gen_ai.server.request.duration, under the name that clients of model servers use.', metrics => metrics.durations),
  histogram(METRIC.timeToFirstChunk, 'The same as gen_ai.server.time_to_first_token, with the bounds of durations.', metrics => metrics.firstChunks),
  histogram(METRIC.stageDuration, 'Calls to nodes by stage, node and outcome.', metrics => metrics.stages),
  histogram(METRIC.admissionWait, 'How long requests with media waited for admission.', metrics => metrics.waits),
  counter(METRIC.requests, 'Requests served, by plan and outcome.', ({ stats }) => stats.served.samples()),
  gauge(METRIC.requestsInFlight, 'Requests being served.', ({ inFlight }) => single(inFlight)),
  counter(METRIC.requestBytes, 'Bytes of request bodies, by plan.', ({ stats }) => stats.requestBytes.samples(), 'By'),
  counter(METRIC.answerBytes, 'Bytes of the answers of nodes, by plan.', ({ stats }) => stats.answerBytes.samples(), 'By'),
  counter(METRIC.retries, 'Plans tried again before the first byte, by what had failed.', ({ stats }) => from0(stats.retried, ATTR.errorType, ['unavailable', 'busy', 'features_gone', 'kv_gone', 'refused'])),
  counter(METRIC.encodeMoves, 'Encode calls that failed and moved to the next encoder.', ({ stats }) => single(stats.encodeMoves)),
  counter(METRIC.encodeFallbacks, 'Requests encoded by the language model because every encoder failed.', ({ stats }) => single(stats.encodeFallbacks)),
  counter(METRIC.encodeSkipped, 'Media items that no encoder had to encode, by reason: an encoder had them, or they stayed with the language model.', ({ stats }) => from0(stats.skipped, ATTR.reason, ['cached', 'language_model'])),
  counter(METRIC.encodedItems, 'Media items encoders have answered for.', ({ stats }) => stats.encoders().map(({ node, items }) => ({ labels: { [ATTR.node]: node }, value: items }))),
  counter(METRIC.cacheHits, 'Of those, the ones an encoder had already.', ({ stats }) => stats.encoders().map(({ node, cached }) => ({ labels: { [ATTR.node]: node }, value: cached }))),
  counter(METRIC.migratedBytes, 'Bytes pulled over a link, as the spans of the engines tell: of sampled requests.', ({ stats }) => stats.links().map(({ from, to, bytes }) => ({ labels: { [ATTR.peer]: from, [ATTR.node]: to }, value: bytes })), 'By'),
  gauge(METRIC.admissionTokens, 'Vision tokens admitted and not yet done.', ({ admission }) => single(admission.stats.inFlight)),
  gauge(METRIC.admissionWaiting, 'Requests waiting for admission.', ({ admission }) => single(admission.stats.waiting)),
  counter(METRIC.admissionRefused, 'Requests turned away with 429, by reason.', ({ admission }) => from0(admission.refusals, ATTR.reason, ['queue_full', 'too_long', 'timeout', 'displaced'])),
  gauge(METRIC.nodeUp, '1 when the node is healthy.', eachNode(node => node.state === 'healthy' ? 1 : 0)),
  gauge(METRIC.nodeRequests, 'Calls in flight at the node.', eachNode(node => node.load.requests)),
  gauge(METRIC.nodeTokens, 'Vision tokens in flight at the node; at a prefill node, estimated prompt tokens.', eachNode(node => node.load.tokens)),
  gauge(METRIC.breakerState, 'Circuit breaker of a node for a stage: 0 closed, 1 half-open, 2 open.', breakers),
  gauge(METRIC.linkUp, '1 when two nodes that exchange features or KV blocks are linked.', links),
  counter(METRIC.keyRequests, 'Requests of a named key, by outcome.', ({ stats }) => stats.keyRequests.samples()),
  counter(METRIC.keyTokens, 'Tokens that a named key has used, by model: input, output, and the vision tokens of the input.', ({ stats }) => stats.keyTokens.samples())
]

function breakers ({ registry }: MetricsSource): Sample[] {
  return registry.snapshot().nodes.flatMap(node => STAGES.map(stage => ({ labels: { [ATTR.node]: node.id, [ATTR.stage]: stage }, value: BREAKER[node.breakers[stage]] })))
}

function links ({ registry }: MetricsSource): Sample[] {
  return registry.snapshot().nodes.flatMap(node => [...node.links.values()]
    .filter(({ from }) => from === node.id)
    .map(({ from, to, state }) => ({ labels: { [ATTR.peer]: from, [ATTR.node]: to }, value: state === 'linked' ? 1 : 0 })))
}

/** For GET /metrics. */
export function familiesOf (source: MetricsSource): Family[] {
  return INSTRUMENTS.map(({ read, histogram, ...told }) => ({ ...told, read: () => read?.(source) ?? histogram!(source.metrics).distributions() }))
}

/** Gives the numbers to the meter of an SDK too, if it is one's. @returns ends that */
export function feedMeter (meter: Meter, source: MetricsSource): () => void {
  if (meter.constructor === createNoopMeter().constructor) return () => {}
  const observed = INSTRUMENTS.flatMap(({ name, type, help: description, unit, read }) => {
    if (read === undefined) return []
    const options = unit === undefined ? { description } : { description, unit }
    return [{ read, instrument: type === 'counter' ? meter.createObservableCounter(name, options) : meter.createObservableGauge(name, options) }]
  })
  const fed = INSTRUMENTS.flatMap(({ name, help: description, unit = '', histogram }) => {
    if (histogram === undefined) return []
    const ours = histogram(source.metrics)
    const theirs = meter.createHistogram(name, { description, unit, advice: { explicitBucketBoundaries: [...ours.bounds] } })
    const record = (value: number, labels: Labels): void => { theirs.record(value, labels) }
    ours.listeners.push(record)
    return [() => { ours.listeners.splice(ours.listeners.indexOf(record), 1) }]
  })
  const collect = (result: BatchObservableResult): void => {
    for (const { instrument, read } of observed) for (const { labels, value } of read(source)) result.observe(instrument, value, labels)
  }
  const instruments = observed.map(({ instrument }) => instrument)
  meter.addBatchObservableCallback(collect, instruments)
  return () => {
    meter.removeBatchObservableCallback(collect, instruments)
    for (const stop of fed) stop()
  }
}
