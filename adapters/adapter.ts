/**
 * The adapter contract: all the core knows of a backend family.
 *
 * An adapter is a value, not a base class, and it is versioned: `specificationVersion` names the contract it was
 * written for. The core has no `if (backend === ...)`: what differs between backends is here, as data (`NodeInfo`)
 * or behind these functions. Retry, tracing and metrics wrap the stages from outside.
 */
import type { Readable } from 'node:stream'
import type { Dispatcher } from 'undici'
import type { Modality } from './wire/media.ts'
import type { Role } from './wire/roles.ts'

export type { Modality } from './wire/media.ts'
export { ROLE_FROM_WIRE, ROLE_TO_WIRE, type Role } from './wire/roles.ts'

export type Stage = 'encode' | 'prefill' | 'decode'

/** A node as an adapter sees it. `id` is the registered URL byte for byte; `url` is where to dial it. */
export interface AdapterNode {
  readonly id: string
  readonly url: string
  readonly role: Role
  /** Sent as `Authorization: Bearer` to this node, never the client's own. */
  readonly apiKey?: string | undefined
  /** What the operator says of its vision; a probe takes it for granted. */
  readonly vision?: NodeInfo['vision'] | undefined
  /** What the operator says of the longest prompt a prefill node takes; a probe takes it for granted. */
  readonly maxPrefillTokens?: number | undefined
  /** Where encoders of vLLM's ECMooncakeConnector push features to, by the operator: one address for each data-parallel replica. */
  readonly ecZmqAddrs?: readonly string[] | undefined
  /** What the last successful probe of this process answered. */
  readonly info?: NodeInfo | undefined
}

/** What a probe learns. The planner pairs nodes by `produces` and `accepts`, and by nothing else. */
export interface NodeInfo {
  readonly status: 'initialising' | 'healthy' | 'draining' | 'sleeping'
  readonly models: readonly string[]
  readonly role: Role
  /** Human-readable backend, for logs and the inspection page: `fastify-epd/0.1.0 pytorch`, `lmdeploy turbomind`, ... */
  readonly backend: string
  readonly version?: string | undefined
  /** Random number drawn at the node's start; another one means another process. */
  readonly epoch?: number | undefined
  /** Identity of the model and its processor; two nodes exchange features only when theirs are equal. */
  readonly fingerprint?: string | undefined
  /** The cards of its GET /v1/models as it wrote them; the gateway's own list shows them. */
  readonly cards?: ReadonlyArray<Readonly<Record<string, unknown>>> | undefined
  /** Transfer formats, `features:<format>` or `kv:<format>`, e.g. `features:epd-zmq/1`. */
  readonly produces: readonly string[]
  readonly accepts: readonly string[]
  /** `full`: encodes media itself; `features`: takes media only as encoder results; `none`: no media at all. */
  readonly vision: 'full' | 'features' | 'none'
  /** Role prefill: the longest prompt it takes, in tokens; any when absent. */
  readonly maxPrefillTokens?: number | undefined
  /** Role decode: it also takes requests without a prefill on another node. */
  readonly standalone?: boolean | undefined
  /** A picture that can't be decoded ends it, or costs it much: the gateway looks at pictures before, unless the operator says otherwise. */
  readonly checkMedia?: boolean | undefined
  /** Why the node is limited, for people: "lmdeploy 0.15+ does not name its cache session: no P/D". */
  readonly notes?: readonly string[] | undefined
  /** What only the adapter understands (engine_info and such). Opaque to the core. */
  readonly details?: unknown
}

/** One image (video, audio) of a request, in order of appearance. Offsets are bytes in the original body. */
export interface MediaItem {
  /** Position among the request's media items, from 0. */
  readonly index: number
  /** Where it stands: its message in the list, and its part in the message, or the part around it. */
  readonly message: number
  readonly part: number
  /** The same for people: `messages[0].content[1]`, `input[2].output[0]`, `messages[0].content[1].content[0]`. */
  readonly path: string
  readonly modality: Modality
  /** The part's type, as the grammar in wire/media.ts has it: image_url, input_image, image, video_url, ... */
  readonly type: string
  /** Why it is for the language model's eyes only, in words: it has no URL (a `uuid` alone, a file's id, embeddings), and `url` is empty. */
  readonly unencodable?: string | undefined
  /** How a chat writes it, where its spelling is one of /v1/messages or /v1/responses. */
  readonly chat?: MediaPart | undefined
  /** The media URL's bytes as they stand in the JSON text, without the quotes; base64 text in some spellings. */
  readonly url: { readonly start: number, readonly end: number }
  /** The whole content part object `{...}`. */
  readonly span: { readonly start: number, readonly end: number }
  /** Of the URL's length and a sample of its bytes as they stand in the body: to choose a node by, and for nothing else. */
  readonly routeKey: string
  /** Its URL is an address that the engine fetches: the bytes behind it may change. */
  readonly remote: boolean
  /** Width and height read from the picture's own header, when it is inline and recognised. */
  readonly size?: { readonly width: number, readonly height: number } | undefined
  /** Estimated vision tokens, for balancing and admission. */
  readonly tokens: number
}

/** A content part written anew: JSON text. With `after`, the bytes of the media URL stay between `before` and `after`. */
export interface MediaPart {
  readonly before: string
  readonly after?: string | undefined
}

/** A member that most engines read and some believe blindly. `param` says where it stands: `messages[0].content[1].uuid`. */
export interface Privileged {
  readonly param: string
  readonly kind: 'control' | 'uuid' | 'embeddings'
}

export interface BodyEdits {
  /** Top-level members to add or replace: name -> JSON text. */
  readonly set?: Readonly<Record<string, string>>
  /** Top-level members to take out. */
  readonly remove?: readonly string[]
  /** New media URLs by item index; undefined keeps the original bytes. */
  readonly mediaUrls?: ReadonlyArray<string | undefined>
  /** New content parts by item index; undefined keeps the original bytes. */
  readonly mediaParts?: ReadonlyArray<MediaPart | undefined>
}

/** The client's request body as bytes. Nothing here parses or stringifies the whole of it. */
export interface RequestBody {
  /** As it came. Valid until the request ends. */
  readonly bytes: Buffer
  readonly model: string
  readonly stream: boolean
  readonly media: readonly MediaItem[]
  /** What only a gateway may send to some engines. Control fields among it are out of every splice already. */
  readonly privileged: readonly Privileged[]
  /** Value of a scalar top-level member, decoded; undefined when absent or not scalar. */
  scalar (name: string): string | number | boolean | null | undefined
  /** Does the body have this top-level member? */
  has (name: string): boolean
  /** Slices of the original bytes which, joined, are the body with the edits made. Control fields are already out. */
  splice (edits: BodyEdits): Buffer[]
  /**
   * A chat request that holds only these media parts, in this order: one user message per original message,
   * plus the top-level members `model`, `mm_processor_kwargs`, `media_io_kwargs` and `set`. Spellings of other APIs are a
   * chat's there. `parts`: as in `BodyEdits`.
   */
  pick (items: readonly MediaItem[], set?: Readonly<Record<string, string>>, parts?: BodyEdits['mediaParts']): Buffer[]
}

/** The part of an AbortSignal that ends a call; every AbortSignal is one. `abortSignalOf` makes one of it for APIs that insist. */
export interface CallSignal {
  readonly aborted: boolean
  readonly reason: unknown
  addEventListener (type: 'abort', listener: () => void): void
  removeEventListener (type: 'abort', listener: () => void): void
}

/** What every call carries: the request's life, the headers to send on, and the means. */
export interface Call {
  /** Aborts when the call must end: its time is up, the client has left, the gateway closes. */
  readonly signal: CallSignal
  /** traceparent, tracestate, x-request-id and such; the adapter adds node credentials from the node. */
  readonly headers: Readonly<Record<string, string>>
  readonly dispatcher: Dispatcher
  readonly log: Log
  /** Of a stream: gets what says that the node is alive before its first event, comments and pings, and the head it came with. Without it they stay in the body. */
  readonly onAlive?: ((bytes: Buffer, response: UpstreamResponse) => void) | undefined
}

export interface Log {
  debug (data: object, message: string): void
  info (data: object, message: string): void
  warn (data: object, message: string): void
  error (data: object, message: string): void
}

/** What E answers for one media item. `wire` is opaque to the core; the rest is for planning and traces. */
export interface EncoderResult {
  readonly item: number
  readonly node: string
  readonly lease: string
  readonly tokens: number
  /** The encoder already had the features. */
  readonly cached: boolean
  readonly wire: unknown
}

/** What P answers. Opaque to the core but for the lease it holds. */
export interface Handoff {
  readonly node: string
  readonly lease: string
  readonly wire: unknown
  /** Prompt tokens, for traces; how many of them P had in its prefix cache. */
  readonly tokens?: number | undefined
  readonly cached?: number | undefined
}

/** A lease that must be ended; the core gives it back to the adapter that made it. */
export interface LeaseRef {
  readonly node: AdapterNode
  readonly lease: string
  readonly wire: unknown
}

export interface Link {
  readonly from: string
  readonly to: string
  readonly transport: string
  /** The consumer also takes requests of which it encodes some items itself. */
  readonly mixes?: boolean | undefined
  /** Epochs of both ends when the link was made; another epoch means the link is dead. */
  readonly epochs: readonly [number | undefined, number | undefined]
}

/** A node's answer, from its head on. The core reads the body to its end or destroys it. */
export interface UpstreamResponse {
  readonly statusCode: number
  /** Names in lower case. */
  readonly headers: Readonly<Record<string, string | string[] | undefined>>
  /** Bytes as the node sent them. An `error` event, or `close` without `end`, means that the node broke off. */
  readonly body: Readable
}

export interface EncodeJob {
  readonly node: AdapterNode
  readonly items: readonly MediaItem[]
  readonly body: RequestBody
  /** The chosen PD or P, for transports that push. */
  readonly consumer: AdapterNode
  /** Separates caches of different customers; part of the content hash. */
  readonly tenant?: string | undefined
  /** The consumer may pull features while others are encoded, and before the call is answered: for the request that it gets under this id. */
  readonly overlap?: string | undefined
}

/** A request whose media are being encoded. */
export interface PrepareJob {
  readonly node: AdapterNode
  /** Path below the node's URL, with query: `/v1/chat/completions`. */
  readonly path: string
  readonly body: RequestBody
  readonly tenant?: string | undefined
}

export interface PrefillJob {
  readonly node: AdapterNode
  /** Path below the node's URL; `/v1/chat/completions` when absent. */
  readonly path?: string | undefined
  readonly decode: AdapterNode
  readonly body: RequestBody
  readonly features: readonly EncoderResult[]
  /** Separates caches of different customers, where the backend can. */
  readonly tenant?: string | undefined
}

export interface GenerateJob {
  readonly node: AdapterNode
  /** Path below the node's URL, with query: `/v1/chat/completions`. */
  readonly path: string
  readonly body: RequestBody
  readonly features: readonly EncoderResult[]
  readonly handoff?: Handoff | undefined
  /** Separates caches of different customers, where the backend can. */
  readonly tenant?: string | undefined
}

export interface Adapter {
  readonly specificationVersion: 'v1'
  readonly name: string
  /** Alive? Which models, role, epoch; what it produces and accepts. Throws UNAVAILABLE. */
  probe (node: AdapterNode, call: Call): Promise<NodeInfo>
  /** P2P handshake and warm-up, `a` producing and `b` consuming. Idempotent. Throws REFUSED with the reason when they can't work together. */
  link (a: AdapterNode, b: AdapterNode, call: Call): Promise<Link>
  /** Forget a link, because an end is gone or has restarted. Best effort, never throws. */
  unlink? (a: AdapterNode, b: AdapterNode, call: Call): Promise<void>
  /** One call for all items of one encoder; results in the order of `items`. */
  encode (job: EncodeJob, call: Call): Promise<EncoderResult[]>
  /** Is the node known to have this item's features already, so that encoding it costs nothing? */
  has? (node: AdapterNode, item: MediaItem, body: RequestBody, tenant?: string): boolean
  /** Tells PD, or P, of a request that will come when its media are encoded, some milliseconds after `encode` was called. Best effort: what it fails with is not looked at. */
  prepare? (job: PrepareJob, call: Call): Promise<void>
  /** P's share of a request that D goes on with. The core gives the hand-off's lease to `release` unless D takes it over. */
  prefill (job: PrefillJob, call: Call): Promise<Handoff>
  /** PD, or D when there is a hand-off. Resolves at the first good upstream event, whose bytes are still in the response's body. */
  generate (job: GenerateJob, call: Call): Promise<UpstreamResponse>
  /** End leases that no consumer will ACK. Best effort, never throws. */
  release (leases: readonly LeaseRef[], call: Call): Promise<void>
  /** Stop a request whose HTTP call was aborted, where closing the connection does not. Best effort, never throws. */
  abort (node: AdapterNode, requestId: string, call: Call): Promise<void>
}

export type AdapterErrorCode = 'FEATURES_GONE' | 'KV_GONE' | 'UNAVAILABLE' | 'BUSY' | 'REJECTED' | 'REFUSED'

/**
 * Whose fault an error is. `client`: another try fails too, and the client gets the node's answer. `node`: it did not
 * answer as it should; whether that counts against its breaker says the table of blame. `pair`: the two nodes can't work together, other nodes may. `none`: the node is well,
 * the same request may succeed later or elsewhere.
 */
export type Fault = 'client' | 'node' | 'pair' | 'none'

const FAULT: Readonly<Record<AdapterErrorCode, Fault>> = {
  FEATURES_GONE: 'none',
  KV_GONE: 'none',
  UNAVAILABLE: 'node',
  BUSY: 'none',
  REJECTED: 'client',
  REFUSED: 'pair'
}

/**
 * How a call broke, where no answer of the node's says it. `unreachable`: no connection, so that the node has not seen the
 * request. `cut`: the connection broke before the answer had begun. `late`: the time was up. `nonsense`: a good status with
 * something that is no answer. `died`: the node says that it goes down.
 * After the first event the core itself says `broken`, or `unread` where the node had had to wait for the client.
 */
export type Breakage = 'unreachable' | 'cut' | 'late' | 'nonsense' | 'died' | 'broken' | 'unread'

/** A whole answer with a bad status, or an error event in place of an answer. */
export interface ErrorResponse {
  readonly statusCode: number
  readonly contentType: string
  readonly body: Buffer
  /** The node's own, names in lower case: Retry-After, rate limits. */
  readonly headers?: UpstreamResponse['headers'] | undefined
}

export interface AdapterErrorOptions {
  readonly node: string
  readonly cause?: unknown
  /** Where it is another one than the code's. */
  readonly fault?: Fault | undefined
  /** Seconds, for BUSY. */
  readonly retryAfter?: number | undefined
  /** The node's answer, where there is one. What becomes of it is in the table of plugin/pipeline/blame.ts. */
  readonly response?: ErrorResponse | undefined
  /** Of UNAVAILABLE without a response; `cut` when absent. */
  readonly how?: Breakage | undefined
  /** With FEATURES_GONE and KV_GONE: the consumer no longer has a link to the producer; the core makes it again. */
  readonly unlinked?: boolean | undefined
  /** With FEATURES_GONE and KV_GONE: the node that made what can't be used, where it is to blame. */
  readonly producer?: string | undefined
  /** P and D can't share this very request, though both are well: the next plan uses a single node. */
  readonly singleNode?: boolean | undefined
}

const kAdapterError = Symbol.for('fastify-epd.AdapterError')

/**
 * The only error an adapter throws on purpose. A call that ends because of `call.signal` rejects with the signal's reason instead.
 *
 * - `FEATURES_GONE`, `KV_GONE`: what a plan relied on no longer exists; the core plans again.
 * - `UNAVAILABLE`: the node can't be reached, broke off or answered with nonsense (`how`), or answered 5xx (`response`).
 * - `BUSY`: the node is full (429, 503); `response` has its answer.
 * - `REJECTED`: the node answered another 4xx, or lacks the route (404, 405, 501); `response` has its answer.
 * - `REFUSED`: two nodes can't work together (link; prefill: P can't work with any D).
 */
export class AdapterError extends Error {
  readonly [kAdapterError] = true
  readonly code: AdapterErrorCode
  readonly fault: Fault
  readonly node: string
  readonly retryAfter: number | undefined
  readonly response: ErrorResponse | undefined
  readonly how: Breakage | undefined
  readonly unlinked: boolean
  readonly producer: string | undefined
  readonly singleNode: boolean

  constructor (code: AdapterErrorCode, message: string, options: AdapterErrorOptions) {
    super(message, { cause: options.cause })
    this.name = 'AdapterError'
    this.code = code
    this.fault = options.fault ?? FAULT[code]
    this.node = options.node
    this.retryAfter = options.retryAfter
    this.response = options.response
    this.how = options.how
    this.unlinked = options.unlinked ?? false
    this.producer = options.producer
    this.singleNode = options.singleNode ?? false
  }

  /** Works across copies of this package, as a third-party adapter may carry its own. */
  static is (value: unknown): value is AdapterError {
    return typeof value === 'object' && value !== null && (value as { [kAdapterError]?: unknown })[kAdapterError] === true
  }
}
