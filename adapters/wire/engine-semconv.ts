/**
 * Names of the spans and attributes engines write. plugin/telemetry/semconv.ts has them too, with every other name
 * of the project; a test holds the two together, as neither side may import the other.
 */
export const ENGINE_TRACER_NAME = 'fastify-epd-engine'

export const ENGINE_SPAN = {
  preprocess: 'engine.preprocess',
  encode: 'engine.encode',
  migrate: 'engine.migrate',
  prefill: 'engine.prefill',
  decode: 'engine.decode'
} as const

export const ENGINE_ATTR = {
  model: 'gen_ai.request.model',
  inputTokens: 'gen_ai.usage.input_tokens',
  outputTokens: 'gen_ai.usage.output_tokens',
  cacheReadTokens: 'gen_ai.usage.cache_read.input_tokens',
  finishReasons: 'gen_ai.response.finish_reasons',
  errorType: 'error.type',
  role: 'epd.role',
  items: 'epd.items',
  /** Items (encoder) or tokens (prefill) found in a cache. */
  cached: 'epd.cached',
  /** Vision tokens of an item, tokens computed in prefill, tokens sampled in decode. */
  tokens: 'epd.tokens',
  /** What a migration moves: `feature` or `kv` blocks. */
  pool: 'epd.pool',
  bytes: 'epd.bytes',
  blocks: 'epd.blocks',
  /** Transport of the link: `ipc` or `tcp`. */
  link: 'epd.link',
  /** Engine id of the other end. */
  peer: 'epd.peer',
  /** Of `bytes`, what came from each peer, in their order. */
  peerBytes: 'epd.peer.bytes',
  /** Items or sequences that shared the run. */
  batch: 'epd.batch',
  queueMs: 'epd.queue_ms',
  requestId: 'epd.request.id',
  aborted: 'epd.aborted'
} as const
