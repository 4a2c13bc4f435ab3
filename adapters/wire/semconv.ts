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
  engineAhead: 'engine.ahead',
  enginePrepare: 'engine.prepare',
  enginePrefill: 'engine.prefill',
  engineDecode: 'engine.decode'
} as const

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
  /** `input`, `output`; with named keys `vision`, which are part of the input. On metrics only. */
  tokenType: 'gen_ai.token.type',
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
  /** Items whose features were pulled, tokens that were computed, ahead of the request: while the encoder worked, or while its answer was on its way. */
  ahead: 'epd.ahead',
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
  /** Name of the client's key, where it has one. */
  key: 'epd.key',
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
