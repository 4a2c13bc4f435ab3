import type { EngineBackend, EngineLog, EngineRole } from './engine-service.ts'

/** CURVE keys, Z85 text as zeromq makes them. */
export interface CurveKeys {
  readonly publicKey: string
  readonly secretKey: string
}

/** Where media of a request may come from. */
export interface MediaPolicy {
  /** Fetch http(s) URLs that resolve to private, loopback or link-local addresses. @default false */
  readonly allowPrivate: boolean
  /** Exact host names that http(s) media may come from; empty: any public host. */
  readonly allowedDomains: readonly string[]
  /** Folder below which `file://` URLs are allowed; absent: none are. */
  readonly directory?: string | undefined
}

/** What `createEncoderEngine` and `createLlmEngine` are given. An option left out takes the engine's own default. */
export interface EngineOptions {
  /** The engine's registered URL, byte for byte: known only once the HTTP server listens, so it listens first. */
  readonly engineId: string
  readonly role: EngineRole
  readonly backend: EngineBackend
  /** Model folder. */
  readonly modelDir: string
  /** Name in /v1/models; by default the folder's. */
  readonly servedModelName?: string | undefined
  /** Host of the P2P socket; a tcp address is bound on it. */
  readonly host: string
  /** `cpu`, `cuda` or `cuda:N`. @default 'cpu' */
  readonly device: string
  /** Threads of each session. */
  readonly threads?: number | undefined
  /** Engines that share this machine's cores; the default number of threads is a share of them. @default 1 */
  readonly sharing?: number | undefined
  /** False: a hybrid or prefill engine never opens the vision encoder and takes media only as encoder results. Decode engines never do. */
  readonly vision: boolean
  /** Items per encoder run, or sequences per decoder run. */
  readonly maxBatchSize?: number | undefined
  /** Requests waiting for room before `busy`. */
  readonly maxQueue?: number | undefined
  readonly featureBlocks?: number | undefined
  readonly kvBlocks?: number | undefined
  /** Tokens per block. */
  readonly blockSize?: number | undefined
  /** Most prompt tokens of one prefill step. */
  readonly maxPrefillTokens?: number | undefined
  /** TurboMind-like engine: tokens a slot has room for, prompt and answer together. */
  readonly sessionLen?: number | undefined
  /** How long a consumer has to begin its pull of what an encoder or a prefill engine answered. */
  readonly leaseMs?: number | undefined
  readonly curve?: CurveKeys | undefined
  /** Public keys of peers that may pull; with {@link curve} only. Absent: engines that use this very pair of keys. */
  readonly allowedPeers?: readonly string[] | undefined
  readonly media: MediaPolicy
  readonly log: EngineLog
}
