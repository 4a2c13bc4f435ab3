/**
 * What an engine is to its api_server. `engines/encoder` and `engines/llm` implement it, `engines/server` serves it.
 * Nothing here knows HTTP but for the status of an answer, and nothing here knows Fastify.
 */
import type { Context } from '@opentelemetry/api'
import { OUR_ENGINE, type EngineInfo } from '../../adapters/wire/distserve.ts'
import type { Role } from '../../adapters/wire/roles.ts'

export type { EngineInfo } from '../../adapters/wire/distserve.ts'
export type EngineRole = Role
export type EngineBackend = EngineInfo['backend']

/** The members of engine_info that are the same in all our engines: one runs on one device. */
export const ONE_DEVICE = { tp_size: 1, ep_size: 1, dp_size: 1, pp_size: null, dp_rank: 0, num_cpu_blocks: 0, engine: OUR_ENGINE } as const

/** Logs to pino's signature: data first, constant message second. Never prompts, pictures or credentials. */
export interface EngineLog {
  debug (data: object, message: string): void
  info (data: object, message: string): void
  warn (data: object, message: string): void
  error (data: object, message: string): void
}

/** The part of a LoadedModel the api_server reads. */
export interface ServedModel {
  /** Served name, the `id` of GET /v1/models. */
  readonly name: string
  readonly fingerprint: string
}

/** The part of the P2P node the api_server drives. Its `endpoint` is JSON-able and opaque to everybody but its like. */
export interface P2PLinks {
  readonly endpoint: object
  /** Messages of peers that were refused, by reason. */
  readonly refused?: Readonly<Record<string, number>> | undefined
  /** Checks, links and warms up; idempotent. Throws P2PError `REFUSED` with the reason when the two can't work together. */
  connect (remote: object, options?: { signal?: AbortSignal, traceparent?: string | undefined }): Promise<unknown>
  /** Forgets a link; unknown ids do nothing. */
  drop (engineId: string): unknown
}

/** Gauges of GET /metrics; what an engine does not have it may leave out (0 is served). */
export const GAUGES = {
  epd_feature_blocks_capacity: 'Feature blocks of the pool',
  epd_feature_blocks_free: 'Feature blocks holding nothing',
  epd_feature_blocks_cached: 'Feature blocks with features that no lease references: findable and evictable',
  epd_kv_blocks_capacity: 'KV blocks of the pool',
  epd_kv_blocks_free: 'KV blocks holding nothing',
  epd_kv_blocks_cached: 'KV blocks holding a prefix no sequence references: findable and evictable',
  epd_kv_blocks_spilled: 'KV blocks of evicted sequences copied to host memory until there is room again',
  epd_leases_open: 'Leases that were neither ACKed, released nor expired'
} as const

export type GaugeName = keyof typeof GAUGES

/** Histograms of the GenAI semantic conventions that an engine feeds, in seconds; the api_server measures whole requests itself. */
export type LatencyName = 'time_to_first_token' | 'time_per_output_token'
type LatencyListener = (name: LatencyName, seconds: number, context: Context | undefined) => void

/**
 * What an engine has done since its start, in plain numbers that GET /metrics reads. The api_server listens for
 * latencies, whose distribution a sum would lose.
 */
export class EngineCounters {
  /** Items that went through the vision encoder (not those found in the cache). */
  encodedItems = 0
  /** Items answered from the feature cache, or joined to the same item in flight. */
  encoderCacheHits = 0
  /** Bytes of blocks pulled into this engine. */
  migratedBytes = 0
  /** ACKs that ended a lease of this engine (as producer). */
  acks = 0
  /** Features offered to this engine before the request they are for: `pulled` ahead of it, and `used` by it; `dropped` for lack of room, or because the encoder failed. */
  readonly ahead = { pulled: 0, used: 0, dropped: 0 }
  #listener: LatencyListener | undefined

  /** @param context the caller's, whose trace the latency is an example of */
  observe (name: LatencyName, seconds: number, context?: Context): void {
    this.#listener?.(name, seconds, context)
  }

  /** One listener: the api_server's histograms. */
  onObserve (listener: LatencyListener): void {
    this.#listener = listener
  }
}

/** One request as the api_server hands it on. */
export interface ChatCall {
  /** The parsed JSON body: untrusted, only known to be an object. */
  readonly body: unknown
  /** Aborts when the client goes away, at POST /abort_request, and at the end of the grace time. */
  readonly signal: AbortSignal
  /** `x-request-id` of the caller, else one of ours. Unique among the requests in flight. */
  readonly requestId: string
  /** `epd_tenant` of the body: separates caches of different customers. */
  readonly tenant?: string | undefined
  /** Header `x-epd-consumer`: the engine that will pull what an encoder or a prefill engine answers. */
  readonly consumer?: string | undefined
  /** Header `x-epd-overlap`: the consumer may pull while this engine still works; for which items of its request. */
  readonly overlap?: string | undefined
  /** Header `x-epd-ahead`: the request comes later. */
  readonly ahead?: boolean | undefined
  /** Trace context of the caller, from `traceparent`. Parent of the engine's spans. */
  readonly context: Context
}

/**
 * `stream`: whole SSE events as bytes. Throwing from the iterator sends an `error` event and ends the stream; the
 * iterator's `return` is called when the client has gone.
 */
export type ChatAnswer =
  | { readonly status: number, readonly json: unknown, readonly headers?: Readonly<Record<string, string>> }
  | { readonly status: number, readonly stream: AsyncIterable<Buffer>, readonly headers?: Readonly<Record<string, string>> }

/** What every request must fit in. */
export interface RequestLimits {
  /** Tokens of prompt and answer together. */
  readonly tokens: number
  /** Messages, and parts of messages. */
  readonly messages: number
  /** UTF-16 code units of the prompt's text. */
  readonly characters: number
}

/** One engine. All methods may be called at any time after construction; `chat` before `ready` waits or throws `initialising`. */
export interface EngineService {
  readonly role: EngineRole
  readonly backend: EngineBackend
  readonly model: ServedModel
  /** Random number drawn at the process's start. */
  readonly epoch: number
  readonly p2p: P2PLinks
  /** Resolves when requests can be served; rejects when that will never be. */
  readonly ready: Promise<void>
  readonly counters: EngineCounters
  /** Why the engine can't serve just now, though it is ready: a thread of it has ended and is being started anew. */
  readonly problem?: string | undefined
  info (): EngineInfo
  /** Of requests; absent where there is none. What is larger is refused with `context_length_exceeded`. */
  readonly limits?: RequestLimits | undefined
  gauges (): Partial<Record<GaugeName, number>>
  /** Sequences (in an encoder: items) by status, for `epd_sequences{status}`. Statuses with none may be left out or be 0. */
  sequences (): Readonly<Record<string, number>>
  /** Throws EngineError. */
  chat (call: ChatCall): Promise<ChatAnswer>
  /** Absent: the route answers 400 `unsupported`. */
  completions? (call: ChatCall): Promise<ChatAnswer>
  responses? (call: ChatCall): Promise<ChatAnswer>
  /** POST /abort_request by request id. False: unknown, or already ended. */
  abort (requestId: string): boolean
  /** POST /abort_request by LMDeploy's session id. */
  abortSession? (sessionId: number): boolean
  /** POST /distserve/free_cache: ends the lease with this session id (or lease id). Repeats and unknown ids do nothing. */
  endSession (id: number | string): void
  /** POST /distserve/clear_cache: drops everything unreferenced. */
  clearCache (): void
  /** Drains, then frees. Idempotent. */
  close (): Promise<void>
}
