/**
 * Every name that gateway and engines put on spans and metrics. GenAI names are those of semantic-conventions v1.41, the
 * last release that carried them (they moved to a repository of their own and are still "Development"), so they are
 * written out here instead of imported. `epd.*` and `engine.*` are ours.
 */

/** Passed to getTracer, so that a backend can translate the names of this version. */
export const SCHEMA_URL = 'https://opentelemetry.io/schemas/1.41.0'
export const TRACER_NAME = 'fastify-epd'
export const ENGINE_TRACER_NAME = 'fastify-epd-engine'

export const SPAN = {
  receive: 'epd.receive',
  plan: 'epd.plan',
  encode: 'epd.encode',
  encodeCall: 'epd.encode.call',
  prefill: 'epd.prefill',
  decode: 'epd.decode',
  enginePreprocess: 'engine.preprocess',
  engineEncode: 'engine.encode',
  engineMigrate: 'engine.migrate',
  enginePrefill: 'engine.prefill',
  engineDecode: 'engine.decode'
} as const

/** Name of the request's own span: low cardinality, `{operation} {model}`. */
export function requestSpanName (operation: string, model: string): string {
  return model === '' ? operation : `${operation} ${model}`
}

export const ATTR = {
  operation: 'gen_ai.operation.name',
  provider: 'gen_ai.provider.name',
  requestModel: 'gen_ai.request.model',
  requestStream: 'gen_ai.request.stream',
  finishReasons: 'gen_ai.response.finish_reasons',
  /** Seconds, streams only. */
  timeToFirstChunk: 'gen_ai.response.time_to_first_chunk',
  inputTokens: 'gen_ai.usage.input_tokens',
  outputTokens: 'gen_ai.usage.output_tokens',
  cacheReadTokens: 'gen_ai.usage.cache_read.input_tokens',
  imageTokens: 'gen_ai.usage.image.input_tokens',
  errorType: 'error.type',
  statusCode: 'http.response.status_code',
  serviceName: 'service.name',
  serviceInstance: 'service.instance.id',
  serviceVersion: 'service.version',
  /** `pd`, `hybrid`, `e-pd`, `p-d`, `e-p-d`: the words of the header x-epd-plan. */
  topology: 'epd.topology',
  /** Why the planner chose it. */
  reason: 'epd.reason',
  stage: 'epd.stage',
  /** Engine id of the node a stage ran on. */
  node: 'epd.node',
  role: 'epd.role',
  /** Engine ids of the encoders, in item order. */
  encoders: 'epd.encoders',
  /** Media items. */
  items: 'epd.items',
  /** Items (encoder) or tokens (prefill) found in a cache. */
  cached: 'epd.cached',
  /** Vision tokens on the encode side, tokens computed in prefill and decode. */
  tokens: 'epd.tokens',
  /** What a migration moves: `feature` or `kv` blocks. */
  pool: 'epd.pool',
  bytes: 'epd.bytes',
  blocks: 'epd.blocks',
  /** Transport of the link: `ipc` or `tcp`. */
  link: 'epd.link',
  /** Engine id of the other end of a migration; several joined by a comma. */
  peer: 'epd.peer',
  /** Of `bytes`, what came from each peer, in their order. */
  peerBytes: 'epd.peer.bytes',
  /** Items or sequences that shared the run. */
  batch: 'epd.batch',
  /** Time a request waited before its turn. */
  queueMs: 'epd.queue_ms',
  /** 1 for the first try. */
  attempt: 'epd.attempt',
  /** Plans tried after the first. */
  retries: 'epd.retries',
  requestId: 'epd.request.id',
  /** Vision tokens of each item and whether its encoder had it already, in item order, beside `epd.encoders`. */
  itemTokens: 'epd.item.tokens',
  itemCached: 'epd.item.cached',
  /** How a stage or request ended: `ok`, or why not. On metrics only: a span has its status. */
  outcome: 'epd.outcome',
  /** The client went away before the end; not an error. */
  aborted: 'epd.aborted'
} as const

export type SpanName = typeof SPAN[keyof typeof SPAN]
export type StageSpanName = typeof SPAN.receive | typeof SPAN.plan | typeof SPAN.encode | typeof SPAN.encodeCall | typeof SPAN.prefill | typeof SPAN.decode

/** Instruments of the gateway. The Prometheus text has `_` for each dot, `_seconds` after times and `_total` after counters. */
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
