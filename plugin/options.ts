import { Ajv, type ErrorObject, type ValidateFunction } from 'ajv'
import type { FastifyRequest, LogLevel } from 'fastify'
import type { Adapter, Role } from '../adapters/adapter.ts'
import { adapters as shipped } from '../adapters/index.ts'
import { OptionsError, type OptionsProblem } from './errors.ts'
import { optionsSchema } from './options-schema.ts'
import type { TraceStore } from './traces/trace-store.ts'

export { OptionsError, optionsSchema, type OptionsProblem }

export interface NodeOptions {
  /** Base URL; becomes the engine id, byte for byte. */
  readonly url: string
  readonly role?: Role | undefined
  /** A shipped adapter's name or that of one in `adapters`; detected by the first probe when absent. */
  readonly adapter?: string | undefined
  readonly models?: readonly string[] | undefined
  /** Sent to this node as bearer token; the client's own is never forwarded. */
  readonly apiKey?: string | undefined
  /** What it does with media, where its probe can't tell or should not have to ask. */
  readonly vision?: 'full' | 'features' | 'none' | undefined
  /** Role prefill: the longest prompt it takes, in tokens, where its probe can't tell. */
  readonly maxPrefillTokens?: number | undefined
  /** Relative capacity. */
  readonly speed?: number | undefined
}

export interface EmbeddedOptionsInput {
  readonly encoders?: number
  readonly engines?: number
  readonly prefill?: number
  readonly decode?: number
  readonly backend?: 'pytorch' | 'turbomind'
  readonly model?: string
}

/** All in milliseconds. */
export interface TimeoutOptions {
  readonly connect: number
  readonly probe: number
  readonly link: number
  readonly encode: number
  /** The call to a prefill node, whose answer begins when the whole prompt is computed. */
  readonly prefill: number
  /** From the call to the language model to the first event of a stream. */
  readonly firstByte: number
  /** The same for an answer that is not streamed, which begins only when all of it is there. */
  readonly answer: number
  /** Between two chunks of an answer. */
  readonly idle: number
  /** Everything up to the first byte: waiting, all attempts, all stages. */
  readonly total: number
  /** How long streams in flight may go on after `close()`. */
  readonly grace: number
}

export interface LimitOptions {
  /** Bytes of a request body. */
  readonly body: number
  /** Media items of a request. */
  readonly items: number
}

export interface AdmissionOptions {
  /** Vision tokens in flight through this gateway; 0: no limit. */
  readonly visionTokens: number
  /** Requests that may wait for admission. */
  readonly queue: number
  /** Milliseconds a request may wait. */
  readonly wait: number
  /** Seconds told to clients in Retry-After. */
  readonly retryAfter: number
}

export interface RoutingOptions {
  /** Vision tokens an encoder may have in flight before its pictures spill over to the next one by hash. */
  readonly encoderTokens: number
  /** With bypass "auto": a picture of at most so many vision tokens is small. */
  readonly smallItem: number
  /** When prefill and decode run on two nodes, where there are nodes for it. */
  readonly disaggregate: 'auto' | 'always' | 'never'
  /** With "auto": a prompt of at least so many tokens, estimated, is worth it. */
  readonly disaggregateTokens: number
}

export interface RouteOptions {
  readonly openai: boolean
  readonly nodes: boolean
  readonly health: boolean
  readonly metrics: boolean
  readonly traces: boolean
}

export type Bypass = 'auto' | 'never'
export type TenantOf = (request: FastifyRequest) => string | undefined

/** What `app.register(epd, options)` takes; every member is optional. `docs/options.md` has the defaults. */
export interface EpdOptions {
  readonly $schema?: string
  readonly embedded?: boolean | EmbeddedOptionsInput
  readonly nodes?: readonly NodeOptions[]
  /** Adapters beyond the shipped ones. */
  readonly adapters?: readonly Adapter[]
  readonly prefix?: string
  readonly routes?: boolean | Partial<RouteOptions>
  /** URLs of routes declared after the plugin that are treated as if they had `config: { epd: true }`. */
  readonly attach?: readonly string[]
  readonly bypass?: Bypass
  readonly routing?: Partial<RoutingOptions>
  readonly timeouts?: Partial<TimeoutOptions>
  readonly retries?: number
  readonly limits?: Partial<LimitOptions>
  readonly admission?: Partial<AdmissionOptions>
  readonly apiKeys?: readonly string[]
  readonly adminKey?: string
  readonly allowedNetworks?: readonly string[]
  readonly headers?: boolean
  readonly telemetry?: {
    /** Keep traces in memory for GET /epd/traces, and how many. */
    readonly traces?: boolean | { readonly max?: number }
    /** In code: the store that an SDK of the application feeds. */
    readonly store?: TraceStore
    /** Keep small copies of pictures for the inspection page. */
    readonly captureContent?: boolean
  }
  /** The inspection page at /epd/. The command line has it on loopback unless this says no. */
  readonly ui?: boolean
  /** A request header's name, or a function of the request. */
  readonly tenant?: string | TenantOf
  readonly logLevel?: LogLevel
}

/** The options with every default in place. */
export interface ResolvedOptions {
  readonly embedded: Required<Omit<EmbeddedOptionsInput, 'model'>> & { readonly model?: string } | undefined
  readonly nodes: readonly NodeOptions[]
  readonly adapters: readonly Adapter[]
  readonly prefix: string
  readonly routes: RouteOptions
  readonly attach: readonly string[]
  readonly bypass: Bypass
  readonly routing: RoutingOptions
  readonly timeouts: TimeoutOptions
  readonly retries: number
  readonly limits: LimitOptions
  readonly admission: AdmissionOptions
  readonly apiKeys: readonly string[]
  readonly adminKey: string | undefined
  readonly allowedNetworks: readonly string[]
  readonly headers: boolean
  /** Traces kept in memory; 0: none. */
  readonly traces: number
  readonly store: TraceStore | undefined
  readonly captureContent: boolean
  readonly ui: boolean
  readonly tenant: string | TenantOf | undefined
  readonly logLevel: LogLevel | undefined
}

type Filled = Omit<ResolvedOptions, 'embedded' | 'routes' | 'bypass' | 'traces' | 'store' | 'captureContent' | 'ui'> & {
  readonly embedded?: boolean | NonNullable<ResolvedOptions['embedded']>
  readonly routes: boolean | Partial<RouteOptions>
  readonly bypass?: Bypass
  readonly telemetry: { readonly traces: boolean | { readonly max?: number }, readonly store?: TraceStore, readonly captureContent: boolean }
  readonly ui?: boolean
}

export const DEFAULT_TRACES = 1_000
const DEFAULT_EMBEDDED = { encoders: 1, engines: 1, prefill: 0, decode: 0, backend: 'pytorch' } as const

const validate = compile()

function compile (): ValidateFunction {
  const ajv = new Ajv({ allErrors: true, strict: true, strictTypes: false, useDefaults: true, verbose: true })
  ajv.addKeyword({ keyword: 'expects', schemaType: 'string' })
  ajv.addKeyword({ keyword: 'isFunction', schemaType: 'boolean', validate: (_schema: boolean, data: unknown) => typeof data === 'function', errors: false })
  return ajv.compile(optionsSchema)
}

/**
 * Checks options against the one schema and puts the defaults in. The argument is not touched.
 *
 * @throws OptionsError with every problem, each with the JSON pointer of its place
 */
export function resolveOptions (raw: unknown): ResolvedOptions {
  const options = copy(raw ?? {})
  if (!validate(options)) throw new OptionsError(problemsOf(validate.errors ?? []))
  const filled = options as Filled
  const mistakes = nodeMistakes(filled)
  if (mistakes.length > 0) throw new OptionsError(mistakes)
  const { embedded, routes, bypass, telemetry, $schema: _, ...rest } = filled as Filled & { $schema?: string }
  const engines = embeddedOf(embedded, filled.nodes)
  return {
    ...rest,
    adminKey: filled.adminKey,
    tenant: filled.tenant,
    logLevel: filled.logLevel,
    prefix: filled.prefix.replace(/\/+$/, ''),
    embedded: engines,
    routes: routesOf(routes, filled.attach),
    // The embedded engines are there to show EPD: it must not be bypassed because the sample pictures are small.
    bypass: bypass ?? (engines === undefined ? 'auto' : 'never'),
    traces: telemetry.traces === true ? DEFAULT_TRACES : telemetry.traces === false ? 0 : telemetry.traces.max ?? DEFAULT_TRACES,
    store: telemetry.store,
    captureContent: telemetry.captureContent,
    ui: filled.ui ?? false
  }
}

/** What no schema can tell: names of adapters that are not there, and nodes that are listed twice. */
function nodeMistakes ({ nodes, adapters }: Filled): OptionsProblem[] {
  const known = new Set([...adapters.map(adapter => adapter.name), ...shipped.keys()])
  return nodes.flatMap(({ url, adapter }, i) => {
    const first = nodes.findIndex(node => node.url === url)
    return [
      ...(adapter === undefined || known.has(adapter) ? [] : [{ instancePath: `/nodes/${i}/adapter`, message: `nodes[${i}].adapter must be one of ${[...known].map(name => JSON.stringify(name)).join(', ')}, not ${shown(adapter)}` }]),
      ...(first === i ? [] : [{ instancePath: `/nodes/${i}/url`, message: `nodes[${i}].url must not be that of nodes[${first}]` }])
    ]
  })
}

function embeddedOf (embedded: Filled['embedded'], nodes: readonly NodeOptions[]): ResolvedOptions['embedded'] {
  if (embedded === false || (embedded === undefined && nodes.length > 0)) return undefined
  if (typeof embedded !== 'object') return DEFAULT_EMBEDDED
  const { prefill = 0, decode = 0 } = embedded
  const apart = prefill > 0 && decode > 0
  const resolved = { ...DEFAULT_EMBEDDED, ...(apart ? { engines: 0 } : {}), ...embedded }
  checkEmbedded(resolved, apart)
  return resolved
}

/** What a schema can't say: whether anybody is left to answer. */
function checkEmbedded ({ engines, prefill, decode }: NonNullable<ResolvedOptions['embedded']>, apart: boolean): void {
  const problem = (member: string, message: string): OptionsError => new OptionsError([{ instancePath: `/embedded/${member}`, message: `embedded.${member} ${message}` }])
  if (prefill > 0 && decode === 0) throw problem('decode', 'must be >= 1 beside embedded.prefill, not 0')
  if (decode > 0 && prefill === 0) throw problem('prefill', 'must be >= 1 beside embedded.decode, not 0')
  if (engines === 0 && !apart) throw problem('engines', 'must be >= 1 without embedded.prefill and embedded.decode, not 0')
}

function routesOf (routes: boolean | Partial<RouteOptions>, attach: readonly string[]): RouteOptions {
  // A gateway that attaches its own routes has them, and its own health and metrics, already.
  const own = routes !== false && attach.length === 0
  return { openai: own, nodes: true, health: own, metrics: own, traces: true, ...(typeof routes === 'object' ? routes : {}) }
}

/** Copies plain objects and arrays, as defaults are written into them; functions and adapters stay what they are. */
function copy (value: unknown, depth = 0): unknown {
  if (Array.isArray(value)) return value.map(item => copy(item, depth + 1))
  if (typeof value !== 'object' || value === null || depth > 8) return value
  const proto: unknown = Object.getPrototypeOf(value)
  if (proto !== Object.prototype && proto !== null) return value
  const entries = Object.entries(value).filter(([, member]) => member !== undefined)
  return Object.fromEntries(entries.map(([key, member]) => [key, depth === 0 && key === 'adapters' ? member : copy(member, depth + 1)]))
}

function problemsOf (errors: readonly ErrorObject[]): OptionsProblem[] {
  const problems = new Map<string, OptionsProblem>()
  const choices = errors.filter(error => error.keyword === 'anyOf')
  for (const error of errors) {
    // A value that may be one of several things: say what is expected once, not why each alternative does not fit.
    const choice = choices.find(one => one !== error && one.instancePath === error.instancePath && error.schemaPath.startsWith(one.schemaPath))
    if (choice !== undefined && error.keyword !== 'additionalProperties') continue
    // But when it is an object, what is wrong in it says more.
    if (error.keyword === 'anyOf' && errors.some(other => within(other, error))) continue
    const problem = problemOf(error)
    if (!problems.has(problem.instancePath)) problems.set(problem.instancePath, problem)
  }
  return [...problems.values()]
}

/** Is `other` about a member of the value that `error` is about? */
function within (other: ErrorObject, error: ErrorObject): boolean {
  return other.instancePath.startsWith(error.instancePath + '/') || (other.instancePath === error.instancePath && other.keyword === 'additionalProperties')
}

function problemOf (error: ErrorObject): OptionsProblem {
  const { instancePath, keyword, params, data } = error
  if (keyword === 'additionalProperties') {
    const name = String((params as { additionalProperty: string }).additionalProperty)
    const known = Object.keys((error.parentSchema as { properties: object }).properties).join(', ')
    const path = `${instancePath}/${name.replaceAll('~', '~0').replaceAll('/', '~1')}`
    return { instancePath: path, message: `unknown option ${dotted(path)} (known here: ${known})` }
  }
  if (keyword === 'required') {
    const missing = `${instancePath}/${String((params as { missingProperty: string }).missingProperty)}`
    return { instancePath, message: `${dotted(missing)} is missing` }
  }
  return { instancePath, message: `${dotted(instancePath) || 'options'} must ${expectation(error)}, not ${shown(data)}` }
}

function expectation (error: ErrorObject): string {
  const { keyword, params, parentSchema } = error
  const expects = (parentSchema as { expects?: string } | undefined)?.expects
  if (expects !== undefined) return `be ${expects}`
  if (keyword === 'enum') return `be one of ${(params as { allowedValues: unknown[] }).allowedValues.map(value => JSON.stringify(value)).join(', ')}`
  if (keyword === 'type') return `be ${/^[aeiou]/.test(String((params as { type: string }).type)) ? 'an' : 'a'} ${String((params as { type: string }).type)}`
  if (keyword === 'minLength') return 'not be empty'
  return (error.message ?? 'be valid').replace(/^must /, '')
}

function shown (data: unknown): string {
  if (typeof data === 'function') return 'a function'
  const text = JSON.stringify(data) ?? String(data)
  return text.length > 60 ? text.slice(0, 57) + '...' : text
}

function dotted (pointer: string): string {
  return pointer.split('/').slice(1).map(part => part.replaceAll('~1', '/').replaceAll('~0', '~'))
    .reduce((path, part) => (/^\d+$/.test(part) ? `${path}[${part}]` : path === '' ? part : `${path}.${part}`), '')
}
