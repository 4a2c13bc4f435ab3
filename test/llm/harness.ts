/** Engines with the shipped model, without HTTP, for tests that send requests and inspect the state. */
import { ROOT_CONTEXT, type Context } from '@opentelemetry/api'
import type { Test } from 'tap'
import type { EncoderResultWire } from '../../adapters/wire/results.ts'
import { createEncoderEngine, type EncoderEngine } from '../../engines/encoder/index.ts'
import type { EngineOptions } from '../../engines/service/engine-options.ts'
import type { ChatAnswer, EngineLog, EngineService } from '../../engines/service/engine-service.ts'
import { EngineError } from '../../engines/service/errors.ts'
import { createLlmEngine, type LlmService, type LlmTuning } from '../../engines/llm/index.ts'
import type { MigrationRequestWire } from '../../adapters/wire/results.ts'
import type { P2PEndpointInfo } from '../../engines/p2p/index.ts'
import { tinyModelDir } from '../helper/tiny-model.ts'
import { until } from '../helper/until.ts'

export const log: EngineLog = { debug () {}, info () {}, warn () {}, error () {} }

export const base: Omit<EngineOptions, 'engineId' | 'role'> = {
  backend: 'pytorch',
  modelDir: tinyModelDir,
  host: '127.0.0.1',
  device: 'cpu',
  threads: 1,
  vision: true,
  media: { allowPrivate: false, allowedDomains: [] },
  log
}

let engines = 0

export async function startLlm (t: Test, options: Partial<EngineOptions> = {}, tuning: LlmTuning = {}): Promise<LlmService> {
  const engine = await createLlmEngine({ ...base, engineId: `http://llm-${++engines}`, role: 'hybrid', ...options }, tuning)
  t.teardown(() => engine.close())
  await engine.ready
  return engine
}

export async function startEncoder (t: Test, options: Partial<EngineOptions> = {}): Promise<EncoderEngine> {
  const engine = await createEncoderEngine({ ...base, engineId: `http://encoder-${++engines}`, role: 'encoder', ...options })
  t.teardown(() => engine.close())
  await engine.ready
  return engine
}

export function endpointOf (engine: { readonly p2p: { readonly endpoint: object } }): P2PEndpointInfo {
  return engine.p2p.endpoint as P2PEndpointInfo
}

/** Links the consumer to the producer, as p2p_connect does. */
export async function link (consumer: LlmService, producer: { readonly p2p: { readonly endpoint: object } }): Promise<void> {
  await consumer.p2p.connect(endpointOf(producer))
}

export interface Completion {
  id: string
  object: string
  model: string
  choices: Array<{ index: number, message: { role: string, content: string }, text?: string, finish_reason: string, logprobs: { content: Array<{ token: string, logprob: number, bytes: number[], top_logprobs: Array<{ token: string, logprob: number }> }> } | null }>
  usage: { prompt_tokens: number, completion_tokens: number, total_tokens: number, prompt_tokens_details: { cached_tokens: number, image_tokens: number } }
}

export interface CallOptions {
  signal?: AbortSignal
  requestId?: string
  tenant?: string
  context?: Context
  consumer?: string
  overlap?: string
  ahead?: boolean
}

let requests = 0

export async function send (engine: EngineService, body: object, options: CallOptions = {}, kind: 'chat' | 'completions' = 'chat'): Promise<ChatAnswer> {
  const call = { body, signal: options.signal ?? new AbortController().signal, requestId: options.requestId ?? `r${++requests}`, tenant: options.tenant, consumer: options.consumer, overlap: options.overlap, ahead: options.ahead, context: options.context ?? ROOT_CONTEXT }
  return kind === 'chat' ? await engine.chat(call) : await (engine as LlmService).completions(call)
}

export async function ask (engine: EngineService, body: object, options: CallOptions = {}): Promise<Completion> {
  return (await send(engine, body, options) as { json: Completion }).json
}

/** The events of a stream, parsed; the last one is the text `[DONE]`. */
export async function events (answer: ChatAnswer): Promise<unknown[]> {
  if (!('stream' in answer)) throw new Error('no stream')
  let text = ''
  for await (const bytes of answer.stream) text += bytes.toString()
  return text.split('\n\n').filter(Boolean).map(event => {
    const data = event.slice('data: '.length)
    return data === '[DONE]' ? data : JSON.parse(data) as unknown
  })
}

export const user = (content: unknown): object => ({ role: 'user', content })

export function pictureParts (urls: readonly string[], text: string): object[] {
  return [...urls.map(url => ({ type: 'image_url', image_url: { url } })), { type: 'text', text }]
}

/** What an encoder answers for these pictures. */
export async function encode (encoder: EncoderEngine, urls: readonly string[], options: CallOptions = {}): Promise<EncoderResultWire[]> {
  const answer = await send(encoder, { messages: [user(urls.map(url => ({ type: 'image_url', image_url: { url } })))] }, options)
  return (answer as { json: { encoder_result: EncoderResultWire[] } }).json.encoder_result
}

/** A chat body with encoder results in the place of pictures. */
export function withResults (results: readonly EncoderResultWire[], text: string, more: object = {}): object {
  return { messages: [user(pictureParts(results.map(result => `epd:${result.lease}`), text))], encoder_result: results, ...more }
}

/** Encodes at E and asks PD: what the gateway does. */
export async function askByEncoder (encoder: EncoderEngine, engine: LlmService, urls: readonly string[], text: string, more: object = {}): Promise<Completion> {
  return await ask(engine, withResults(await encode(encoder, urls), text, more))
}

/** P's answer: a completion of one token and what D needs to go on. */
export interface Prefilled extends Completion {
  cache_block_ids: number[]
  remote_token_ids: number[]
  cache_session_id: number
  migration_request: MigrationRequestWire
}

/** The body a gateway sends P: the client's, for one token whose KV blocks are kept. */
export function prefillBody (body: object): object {
  const { stream_options: _, ...rest } = body as Record<string, unknown>
  const clamped = Object.fromEntries(['min_tokens', 'min_new_tokens'].filter(key => typeof rest[key] === 'number').map(key => [key, Math.min(rest[key] as number, 1)]))
  const limits = 'prompt' in rest ? { max_tokens: 1 } : { max_tokens: 1, max_completion_tokens: 1 }
  return { ...rest, ...clamped, ...limits, stream: false, with_cache: true, preserve_cache: true }
}

export async function prefill (engine: LlmService, body: object, options: CallOptions = {}): Promise<Prefilled> {
  return (await send(engine, prefillBody(body), options, 'prompt' in body ? 'completions' : 'chat') as { json: Prefilled }).json
}

/** The body a gateway sends D: the client's, without pixels, and P's migration request. */
export function decodeBody (body: object, { migration_request: migration }: Pick<Prefilled, 'migration_request'>): object {
  const { encoder_result: _, messages, ...rest } = body as { encoder_result?: unknown, messages?: Array<{ content: unknown }> }
  const place = (part: { type: string }): object => part.type === 'image_url' ? { type: 'image_url', image_url: { url: `epd:${migration.lease}` } } : part
  const placed = messages?.map(message => ({ ...message, content: Array.isArray(message.content) ? message.content.map(place) : message.content }))
  return { ...rest, ...(placed === undefined ? {} : { messages: placed }), migration_request: migration }
}

/** Prefills at P and asks D: what the gateway does. */
export async function askByPrefill (p: LlmService, d: LlmService, body: object, options: CallOptions = {}): Promise<Completion> {
  const answer = await send(d, decodeBody(body, await prefill(p, body, options)), options, 'prompt' in body ? 'completions' : 'chat')
  return (answer as { json: Completion }).json
}

/** The EngineError a call fails with; undefined when it does not fail. */
export async function failure (call: Promise<unknown>): Promise<{ status: number, code: string, param: string | undefined, message: string } | undefined> {
  try {
    await call
    return undefined
  } catch (err) {
    if (!EngineError.is(err)) throw err
    return { status: err.status, code: err.code, param: err.param, message: err.message }
  }
}

/** Everything given back: no sequence, no lease, all blocks free or cached, and all free once the caches are cleared. */
export async function checkIdle (t: Test, ...all: Array<LlmService | EncoderEngine>): Promise<void> {
  await until(() => all.every(engine => Object.values(engine.sequences()).every(n => n === 0) && engine.gauges().epd_leases_open === 0), 'the engines are idle')
  for (const engine of all) {
    const before = engine.gauges()
    t.equal((before.epd_feature_blocks_free ?? 0) + (before.epd_feature_blocks_cached ?? 0), before.epd_feature_blocks_capacity ?? 0, 'feature blocks are free or cached')
    t.equal((before.epd_kv_blocks_free ?? 0) + (before.epd_kv_blocks_cached ?? 0), before.epd_kv_blocks_capacity ?? 0, 'KV blocks are free or cached')
    if ('runtime' in engine) engine.runtime?.engine.checkIntegrity()
    engine.clearCache()
    const after = engine.gauges()
    t.equal(after.epd_feature_blocks_free, after.epd_feature_blocks_capacity)
    t.equal(after.epd_kv_blocks_free ?? 0, after.epd_kv_blocks_capacity ?? 0)
  }
}
