/**
 * The options of `app.register(epd, options)` and of epd.config.json, written once: types, bounds, defaults and the
 * descriptions that an editor shows. `npm run schema` writes the JSON part to epd.config.schema.json.
 */
import type { ObjectOptions, SchemaOptions, Static, TProperties, TSchema } from '@sinclair/typebox'
import type { FastifyRequest } from 'fastify'
import type { Adapter } from '../../adapters/adapter.ts'
import { POLICIES, type Policy } from '../planning/policy.ts'
import type { TraceStore } from '../traces/store.ts'
import { Type } from './type.ts'

/** `expects` completes the message "X must be ...". Two more keywords of ours, `inCode` and `isFunction`, mark what JSON can not hold. */
type Options = SchemaOptions & { readonly expects?: string }

function oneOf<const T extends readonly string[]> (values: T, options: Options = {}) {
  return Type.Unsafe<T[number]>({ enum: values, ...options })
}

/** A function, which JSON can not hold. */
function inCode<T extends (...args: never[]) => unknown> () {
  return Type.Unsafe<T>({ isFunction: true })
}

function list<T extends TSchema> (items: T, description: string) {
  return Type.Unsafe<ReadonlyArray<Static<T>>>(Type.Array(items, { default: [], description }))
}

function object<T extends TProperties> (members: T, options: ObjectOptions = {}) {
  return Type.Object(members, { additionalProperties: false, ...options })
}

/** A group of members that all have defaults: optional to write, always there once resolved. */
function section<T extends TProperties> (members: T, description: string) {
  return Type.Partial(object(members), { default: {}, description })
}

function switchOr<T extends TSchema> (choice: T, options: Options) {
  return Type.Union([Type.Boolean(), choice], options)
}

function text (description: string, options: Options & { readonly pattern?: string, readonly default?: string } = {}) {
  return Type.String({ minLength: 1, description, ...options })
}

function token (description: string) {
  return text(description, { pattern: '^[\\x20-\\x7e\\x80-\\xff]+$', expects: 'text that a header can have' })
}

const headerName = Type.String({ pattern: '^[A-Za-z0-9!#$%&\'*+.^_`|~-]{1,64}$', expects: 'the name of a header' })

function milliseconds (value: number, description: string, minimum = 1) {
  return Type.Integer({ minimum, maximum: 86_400_000, default: value, description })
}

const node = object({
  url: Type.String({ pattern: '^https?://[^\\s/?#]+[^\\s?#]*$', expects: 'an http:// or https:// URL', description: 'Base URL, and the engine id: write it as the node itself does. Slashes at its end make no other node.' }),
  role: Type.Optional(oneOf(['encoder', 'prefill', 'decode', 'hybrid'])),
  adapter: Type.Optional(text('Name of a shipped adapter or of one in `adapters`; the first probe detects it when absent.')),
  models: Type.Optional(Type.Unsafe<readonly string[]>(Type.Array(text('Model name.'), { description: 'Restricts the node to these models.' }))),
  apiKey: Type.Optional(token("Bearer token for this node. The gateway never forwards a client's own.")),
  vision: Type.Optional(oneOf(['full', 'features', 'none'], { description: 'What the node does with media: encodes them, takes encoder results only, or neither. The probe finds out when absent.' })),
  maxPrefillTokens: Type.Optional(Type.Integer({ minimum: 1, description: 'Role prefill: the longest prompt it takes, in tokens. The probe finds out when absent.' })),
  ecZmqAddrs: Type.Optional(Type.Unsafe<readonly string[]>(Type.Array(Type.String({ pattern: '^tcp://[^\\s/]+:[0-9]+$', expects: 'an address such as tcp://10.0.0.6:14579' }), { minItems: 1, description: 'vLLM with ECMooncakeConnector: where encoders push features to, one control address for each data-parallel replica.' }))),
  checkMedia: Type.Optional(Type.Boolean({ description: 'The gateway looks at the pictures of a request before the node gets it. Default: for nodes that a bad picture ends, which the probe finds out.' })),
  speed: Type.Optional(Type.Number({ exclusiveMinimum: 0, description: 'Relative capacity, for balancing.' }))
})

/** What all nodes of a source have in common. */
const { url: _url, ecZmqAddrs: _addresses, ...shared } = node.properties

const kubernetes = object({
  selector: text('Label selector of the pods: app=encoder.'),
  namespace: Type.Optional(text('Default: that of the kubeconfig or of the own pod.')),
  port: Type.Integer({ minimum: 1, maximum: 65_535, description: 'Of all pods.' }),
  roleLabel: Type.Optional(text('Label whose value is the role of a pod, where it has one.')),
  kubeconfig: Type.Optional(text('File. Default: KUBECONFIG, ~/.kube/config, or the service account of the own pod.'))
}, { description: 'Pods that are ready are nodes. Needs the package @kubernetes/client-node.' })

const source = object({
  dns: Type.Optional(Type.String({ pattern: '^[\\w-]{1,63}(\\.[\\w-]{1,63})*\\.?$', expects: 'a name such as encoder.vlm.svc', description: 'Name whose addresses are nodes: A and AAAA records with `port`, else SRV records.' })),
  port: Type.Optional(Type.Integer({ minimum: 1, maximum: 65_535, description: 'Of all addresses of `dns`. Without it `dns` names SRV records, which have ports.' })),
  server: Type.Optional(Type.String({ pattern: '^(\\d{1,3}(\\.\\d{1,3}){3}|\\[[0-9a-fA-F:.]+\\])(:\\d{1,5})?$', expects: 'an address such as 10.0.0.2:53 or [::1]:53', description: 'Name server to ask for `dns`. Default: that of the system.' })),
  kubernetes: Type.Optional(kubernetes),
  ...shared,
  scheme: Type.Optional(oneOf(['http', 'https'], { description: 'Of their URLs. Default http.' }))
})

const engineCount = (description: string) => Type.Integer({ minimum: 0, maximum: 16, description })

const embedded = Type.Partial(object({
  encoders: engineCount('Encoder engines.'),
  engines: engineCount('Engines that prefill and decode.'),
  prefill: engineCount('Engines that only prefill.'),
  decode: engineCount('Engines that only decode.'),
  backend: oneOf(['pytorch', 'turbomind'], { description: 'Kind of the engines that prefill and decode.' }),
  model: text('Model folder; the shipped tiny model when absent.')
}))

const routes = Type.Partial(object({
  openai: Type.Boolean({ description: 'POST /v1/chat/completions, POST /v1/completions, GET /v1/models, other /v1/*, /tokenize, /detokenize, /score, /rerank, /v2/rerank, /pooling.' }),
  nodes: Type.Boolean({ description: '/nodes/* and POST /distserve/connection_warmup.' }),
  sglang: Type.Boolean({ description: 'What SGLang\'s encoders call: /register_encoder_url, /unregister_encoder_url, /list_encoder_urls; its language servers: /sglang/v/*.' }),
  vllm: Type.Boolean({ description: 'What launch scripts of vLLM\'s disagg_epd_proxy.py call: /instances.' }),
  health: Type.Boolean({ description: 'GET /livez, /readyz and /health.' }),
  metrics: Type.Boolean({ description: 'GET /metrics.' }),
  traces: Type.Boolean({ description: '/epd/traces and POST /epd/otlp/v1/traces.' })
}))

const routing = section({
  policy: Type.Union([oneOf(POLICIES), inCode<Policy>()], { default: 'prefix', expects: `one of ${POLICIES.map(name => `"${name}"`).join(', ')} or, in code, a function`, description: 'Which of the nodes that can take a request comes first.' }),
  nodeTokens: Type.Integer({ minimum: 1, default: 4_096, description: 'Tokens that a language model may have in flight before conversations spill over to the next one by hash.' }),
  encoderTokens: Type.Integer({ minimum: 1, default: 16_384, description: 'Vision tokens an encoder may have in flight before its pictures spill over to the next one by hash.' }),
  smallItem: Type.Integer({ minimum: 0, default: 256, description: 'With bypass "auto": a picture of at most so many vision tokens is small.' }),
  disaggregate: oneOf(['auto', 'always', 'never'], { default: 'auto', description: 'When prefill and decode run on two nodes, where there are nodes for it.' }),
  panicThreshold: Type.Integer({ minimum: 0, maximum: 100, default: 50, description: 'Per cent. When breakers leave less of a model\'s healthy nodes of one role, they are disregarded. The last node is asked in any case.' }),
  disaggregateTokens: Type.Integer({ minimum: 0, default: 1_024, description: 'With disaggregate "auto": a prompt of at least so many estimated tokens is long.' })
}, 'How requests are spread over nodes.')

const timeouts = section({
  request: milliseconds(120_000, 'For a client to send its request, with `fastify-epd serve`. In code: Fastify\'s own requestTimeout.'),
  connect: milliseconds(3_000, 'To connect to a node.'),
  probe: milliseconds(15_000, 'A health probe.'),
  link: milliseconds(10_000, 'The handshake of two nodes.'),
  encode: milliseconds(30_000, 'One encode call.'),
  prefill: milliseconds(120_000, 'The call to a prefill node, which answers when it has computed the whole prompt.'),
  firstByte: milliseconds(120_000, 'From the call to the language model to the first event of a stream.'),
  answer: milliseconds(600_000, 'The same for an answer that is not streamed, which begins when all of it is there.'),
  idle: milliseconds(120_000, 'Silence in the middle of an answer.'),
  total: milliseconds(600_000, 'Everything before the first byte: waiting, all attempts, all stages.'),
  grace: milliseconds(10_000, 'How long requests in flight may go on after close().', 0)
}, 'Milliseconds.')

const sse = section({
  keepAlive: milliseconds(15_000, 'Silence in an accepted stream after which the gateway sends a comment; 0: never.', 0)
}, 'Event streams.')

const limits = section({
  body: Type.Integer({ minimum: 1_024, maximum: 1_073_741_824, default: 67_108_864, description: 'Bytes of a request body.' }),
  gzip: Type.Boolean({ default: false, description: 'Takes request bodies with content-encoding gzip.' }),
  zstd: Type.Boolean({ default: false, description: 'Takes request bodies with content-encoding zstd.' }),
  items: Type.Integer({ minimum: 1, maximum: 512, default: 64, description: 'Media items of a request.' })
}, 'Bounds of one request.')

const media = section({
  allowPrivate: Type.Boolean({ default: false, description: 'Fetch from private, loopback and link-local addresses.' }),
  allowedDomains: list(text('Host name.'), 'Host names that pictures may come from; none: any public host.'),
  maxBytes: Type.Integer({ minimum: 1, default: 33_554_432, description: 'Bytes of one picture.' }),
  timeout: milliseconds(10_000, 'One fetch with its redirects.')
}, 'How the gateway looks at pictures, for nodes with checkMedia.')

const admission = section({
  visionTokens: Type.Integer({ minimum: 0, default: 262_144, description: 'Vision tokens in flight through this gateway; 0: no limit.' }),
  encoderTime: milliseconds(4_000, 'Milliseconds of work, by their measured rate, that encoders may have in flight.', 1),
  queue: Type.Integer({ minimum: 0, default: 256, description: 'Requests that may wait for admission.' }),
  wait: milliseconds(10_000, 'Milliseconds a request may wait.', 0),
  retryAfter: Type.Integer({ minimum: 1, maximum: 3_600, default: 1, description: 'Least seconds in Retry-After of a refused request.' })
}, 'Bounds the vision work in flight through this gateway.')

const rate = (description: string) => Type.Optional(Type.Integer({ minimum: 0, description }))

const key = object({
  name: Type.String({ pattern: '^[\\w.@-]{1,64}$', expects: 'letters, digits, _ . @ and -, at most 64', description: 'Stands in the log, in metrics and in Redis.' }),
  hash: Type.String({ pattern: '^sha256:[0-9a-fA-F]{64}$', expects: '"sha256:" and 64 hexadecimal digits', description: 'SHA-256 of the key: printf %s KEY | sha256sum.' }),
  models: Type.Optional(Type.Unsafe<readonly string[]>(Type.Array(text('Model name.'), { description: 'The only models that it may use.' }))),
  requests: rate('Requests a minute.'),
  tokens: rate('Tokens a minute, of prompts and answers.'),
  visionTokens: rate('Vision tokens a minute.'),
  concurrency: rate('Requests at once, at one gateway.'),
  priority: Type.Optional(Type.Integer({ minimum: -100, maximum: 100, description: 'Of its requests where they wait; higher goes first. Default 0.' }))
})

const rates = section({
  redis: Type.Optional(Type.String({ pattern: '^rediss?://', expects: 'a redis:// or rediss:// URL', description: 'Redis or Valkey that counts for several gateways; none: each counts for itself. Needs the package ioredis.' })),
  whenAway: oneOf(['open', 'closed'], { default: 'open', description: 'While Redis does not answer: each gateway counts for itself (open), or requests of keys with bounds are refused with 503 (closed).' }),
  redisTimeout: milliseconds(250, 'How long Redis may take to answer.')
}, 'Where the rates of keys are counted.')

const telemetry = Type.Partial(object({
  traces: switchOr(object({ max: Type.Optional(Type.Integer({ minimum: 1, maximum: 1_000_000 })) }),
    { default: true, expects: 'true, false or { "max": number of traces kept }', description: 'Keeps traces in memory for GET /epd/traces, and how many.' }),
  store: Type.Unsafe<TraceStore>({ type: 'object', inCode: true, expects: 'a TraceStore; give it in code', description: 'Where traces are kept, such as a store that the application\'s OpenTelemetry SDK adds spans to.' }),
  captureContent: Type.Boolean({ default: false, description: 'Keeps small copies of pictures for the inspection page.' })
}), { default: {} })

const tls = object({
  cert: text('File of the certificate with its chain, as PEM.'),
  key: text('File of its private key, as PEM.'),
  passphrase: Type.Optional(text('Of the private key.')),
  clientCa: Type.Optional(text('File of the authorities whose certificates clients must show, as PEM; none: clients need no certificate.'))
})

const server = section({
  host: text('Address to listen on; --host goes before it.', { default: '127.0.0.1' }),
  port: Type.Integer({ minimum: 0, maximum: 65_535, default: 8_000, description: 'Port to listen on, 0 takes a free one; --port goes before it.' }),
  tls: Type.Optional(tls),
  workers: Type.Integer({ minimum: 1, maximum: 64, default: 1, description: 'Processes that serve requests under one port; --workers goes before it.' }),
  accessLog: Type.Boolean({ default: true, description: 'One log line, of level info, for each request of the OpenAI routes.' }),
  stateFile: Type.Optional(text('File that keeps the nodes that register at run time, and those that are drained, over a restart.'))
}, 'With `fastify-epd serve` only: how it listens. In code: Fastify\'s own options.')

const vllmSection = section({
  secret: Type.Optional(text('Key of the names under which vLLM keeps pictures: the same at all replicas of a gateway. Default: random.')),
  handoff: oneOf(['auto', 'raw', 'rewrite'], { default: 'auto', description: 'How features reach the language model: beside its pictures (raw) or in their place (rewrite). auto: in their place where the encoder says where they lie.' }),
  embeds: oneOf(['refuse', 'allow'], { default: 'refuse', description: 'What to do with embeddings that a client sends to vLLM. They end its process when they do not fit: allow them to trusted gateways only.' })
}, 'How nodes of the adapter vllm are used.')

const adapter = Type.Object({ name: text('As nodes name it.'), specificationVersion: Type.Literal('v1', { expects: '"v1"' }) }, { expects: 'an adapter (an object with specificationVersion "v1"); give it in code' })

export const optionsSchema = Type.Partial(object({
  $schema: Type.String({ description: 'For editors: ./node_modules/fastify-epd/epd.config.schema.json' }),
  embedded: switchOr(embedded, { expects: `true, false or an object with ${Object.keys(embedded.properties).join(', ')}`, description: 'Engines started as child processes. Default: true without nodes, else false.' }),
  nodes: list(node, 'Model servers known from the start. Others register with POST /nodes/add.'),
  discover: list(source, 'Where nodes are found that come and go.'),
  adapters: Type.Unsafe<readonly Adapter[]>(Type.Array(adapter, { default: [], inCode: true, description: 'Adapters beyond the shipped ones.' })),
  prefix: Type.String({ pattern: '^(/[\\w.~@-]+)*/?$', default: '', expects: 'empty or a path that begins with /, of letters, digits and - _ . ~ @', description: 'Path in front of all own routes.' }),
  routes: switchOr(routes, { default: true, expects: `true, false or an object with ${Object.keys(routes.properties).join(', ')}`, description: 'Which routes the plugin mounts.' }),
  attach: list(Type.String({ pattern: '^/', expects: 'a path that begins with /' }), 'URLs of routes declared after the plugin that are treated as if they had `config: { epd: true }`.'),
  bypass: oneOf(['auto', 'never'], { description: 'When the language model encodes pictures itself although there are encoders. Default: never with embedded engines, else auto.' }),
  overlap: Type.Boolean({ default: true, description: 'A language model without other requests tokenises, pulls features and computes the prompt as far as it can, while encoders work, where both can.' }),
  routing,
  timeouts,
  vllm: vllmSection,
  retries: Type.Integer({ minimum: 0, maximum: 5, default: 2, description: 'How often a request starts again at the plan after a node failed under it.' }),
  sse,
  server,
  limits,
  media,
  admission,
  aliases: Type.Unsafe<Readonly<Record<string, string | readonly string[]>>>({
    type: 'object',
    default: {},
    additionalProperties: { anyOf: [{ type: 'string', minLength: 1 }, { type: 'array', minItems: 1, items: { type: 'string', minLength: 1 } }], expects: 'a model name or a list of them' },
    description: 'Names that stand for models: each for the first of its list that a request would find a node for.'
  }),
  apiKeys: list(token('Bearer token.'), 'Bearer tokens for the OpenAI routes; none: no key is needed.'),
  keys: list(key, 'Named keys for the OpenAI routes, with what each may use.'),
  rates,
  cors: list(Type.String({ pattern: '^(\\*|https?://[^\\s/]+)$', expects: '"*" or an origin such as https://app.example.com' }), 'Origins whose pages may use the OpenAI routes; "*": any.'),
  adminKey: token('Bearer token with which the routes of operators answer from anywhere.'),
  allowedNetworks: list(Type.String({ pattern: '^[0-9a-fA-F.:]+(/[0-9]{1,3})?$', expects: 'an IP address or a network such as 10.0.0.0/8' }), 'Where the routes of operators answer without a key, beside loopback.'),
  headers: Type.Boolean({ default: true, description: 'Response headers x-epd-plan, x-epd-reason, x-epd-encoders, x-epd-trace-id.' }),
  forwardHeaders: list(headerName, "Headers of a client's request that go to the nodes too."),
  ui: Type.Boolean({ description: 'The inspection page at /epd/. Default: false; true from the command line on loopback.' }),
  telemetry,
  tenant: Type.Union([headerName, inCode<TenantOf>()], { expects: "a request header's name or, in code, a function", description: 'Separates the caches of different customers.' }),
  logLevel: oneOf(['trace', 'debug', 'info', 'warn', 'error', 'fatal', 'silent'], { description: "Log level of the plugin's own routes. Default: the application's." })
}), { $id: 'epd.config.json' })

/** What `app.register(epd, options)` takes; every member is optional. docs/options.md explains each. */
export interface EpdOptions extends Static<typeof optionsSchema> {}
export interface NodeOptions extends Static<typeof node> {}
export interface SourceOptions extends Static<typeof source> {}
export interface PodOptions extends Static<typeof kubernetes> {}
export type EmbeddedOptions = Static<typeof embedded>
export type RouteOptions = Required<Static<typeof routes>>
export type RoutingOptions = Required<Static<typeof routing>>
export type TimeoutOptions = Required<Static<typeof timeouts>>
export type ServerOptions = Required<Omit<Static<typeof server>, 'tls' | 'stateFile'>> & Pick<Static<typeof server>, 'tls' | 'stateFile'>
export type TlsOptions = Static<typeof tls>
export interface KeyOptions extends Static<typeof key> {}
export type RateOptions = Required<Omit<Static<typeof rates>, 'redis'>> & Pick<Static<typeof rates>, 'redis'>
export type SseOptions = Required<Static<typeof sse>>
export type LimitOptions = Required<Static<typeof limits>>
export type MediaOptions = Required<Static<typeof media>>
export type AdmissionOptions = Required<Static<typeof admission>>
export type VllmDefaults = Static<typeof vllmSection>
export type Bypass = NonNullable<EpdOptions['bypass']>
export type TenantOf = (request: FastifyRequest) => string | undefined
