import { isIP } from 'node:net'
import { Ajv, type ErrorObject } from 'ajv'
import { adapters as shipped, checkAdapter } from '../../adapters/index.ts'
import { isForwardable } from '../../adapters/wire/headers.ts'
import { OptionsError, type OptionsProblem } from '../errors.ts'
import { checkUrl, sameNode } from '../registry/node-url.ts'
import { missingPackages } from './packages.ts'
import type { TraceStore } from '../traces/store.ts'
import {
  optionsSchema, type AdmissionOptions, type EmbeddedOptions, type EpdOptions, type LimitOptions, type MediaOptions, type RouteOptions, type RateOptions, type RoutingOptions, type ServerOptions, type SseOptions, type TimeoutOptions, type VllmDefaults
} from './schema.ts'

export { OptionsError, type OptionsProblem }
export { optionsSchema, type AdmissionOptions, type Bypass, type EpdOptions, type KeyOptions, type MediaOptions, type NodeOptions, type PodOptions, type RateOptions, type RoutingOptions, type SourceOptions, type TlsOptions } from './schema.ts'

/** Options whose default stands in the schema, which Ajv fills in. */
interface Defaults extends Readonly<Required<Pick<EpdOptions, 'nodes' | 'discover' | 'adapters' | 'prefix' | 'attach' | 'overlap' | 'retries' | 'aliases' | 'apiKeys' | 'keys' | 'cors' | 'allowedNetworks' | 'headers' | 'forwardHeaders'>>> {
  readonly routing: RoutingOptions
  readonly sse: SseOptions
  readonly server: ServerOptions
  readonly rates: RateOptions
  readonly timeouts: TimeoutOptions
  readonly limits: LimitOptions
  readonly media: MediaOptions
  readonly admission: AdmissionOptions
  readonly vllm: VllmDefaults
}

/** The options with every default in place. */
export interface ResolvedOptions extends Defaults, Readonly<Required<Pick<EpdOptions, 'bypass' | 'ui'>>> {
  readonly embedded: EmbeddedEngines | undefined
  readonly routes: RouteOptions
  readonly adminKey: string | undefined
  /** Traces kept in memory; 0: none. */
  readonly traces: number
  readonly store: TraceStore | undefined
  readonly captureContent: boolean
  readonly tenant: EpdOptions['tenant'] | undefined
  readonly logLevel: EpdOptions['logLevel'] | undefined
}

/** What Ajv leaves: the choices whose alternatives have no defaults of their own are resolved below. */
type Filled = EpdOptions & Defaults & {
  readonly routes: boolean | Partial<RouteOptions>
  readonly telemetry: { readonly traces: boolean | { readonly max?: number }, readonly store?: TraceStore, readonly captureContent: boolean }
}

/** How many engines of each kind to start, and with which model; undefined: the shipped tiny model. */
export type EmbeddedEngines = Readonly<Required<Omit<EmbeddedOptions, 'model'>> & Pick<EmbeddedOptions, 'model'>>

const DEFAULT_TRACES = 1_000
const DEFAULT_EMBEDDED = { encoders: 1, engines: 1, prefill: 0, decode: 0, backend: 'pytorch' } as const

// Half of the time that compiling takes, which each start pays, goes into checking our own schema, which a test does, and
// into making the code small (85 of 175 ms CPU).
const ajv = new Ajv({ allErrors: true, strict: true, strictTypes: false, useDefaults: true, verbose: true, meta: false, validateSchema: false, code: { optimize: false } })
ajv.addVocabulary(['expects', 'inCode'])
ajv.addKeyword({ keyword: 'isFunction', schemaType: 'boolean', validate: (_schema: boolean, data: unknown) => typeof data === 'function', errors: false })
const fill = ajv.compile<Filled>(optionsSchema)

/**
 * Checks options against the schema and fills in the defaults. Does not change its argument.
 *
 * @throws OptionsError with every problem, each with the JSON pointer of its place
 */
export function resolveOptions (raw: unknown): ResolvedOptions {
  const options = copy(raw ?? {})
  if (!fill(options)) throw new OptionsError(problemsOf(fill.errors ?? []))
  const { $schema: _, embedded, routes, telemetry, ...rest } = options
  const engines = embeddedOf(embedded, options)
  const mistakes = [...options.adapters.flatMap(adapterMistake), ...nodeMistakes(options), ...sourceMistakes(options), ...keyMistakes(options), ...headerMistakes(options), ...networkMistakes(options), ...missingPackages(options), ...(engines === undefined ? [] : embeddedMistakes(engines))]
  if (mistakes.length > 0) throw new OptionsError(mistakes)
  return {
    ...rest,
    adminKey: options.adminKey,
    tenant: options.tenant,
    logLevel: options.logLevel,
    prefix: options.prefix.replace(/\/+$/, ''),
    embedded: engines,
    routes: routesOf(routes, options.attach),
    // The embedded engines exist to show EPD, so their small sample pictures must not bypass the encoder.
    bypass: options.bypass ?? (engines === undefined ? 'auto' : 'never'),
    traces: telemetry.traces === true ? DEFAULT_TRACES : telemetry.traces === false ? 0 : telemetry.traces.max ?? DEFAULT_TRACES,
    store: telemetry.store,
    captureContent: telemetry.captureContent,
    ui: options.ui ?? false
  }
}

function adapterMistake (adapter: unknown, i: number): OptionsProblem[] {
  try {
    checkAdapter(adapter)
    return []
  } catch (err) {
    return [{ instancePath: `/adapters/${i}`, message: `adapters[${i}]: ${(err as Error).message}` }]
  }
}

/** What the schema can't express about nodes: unknown adapters, URLs that are no node's, and repeated ones. */
function nodeMistakes ({ nodes, discover, adapters }: Filled): OptionsProblem[] {
  const known = new Set([...adapters.map(adapter => adapter.name), ...shipped.keys()])
  const names = [...known].map(name => JSON.stringify(name)).join(', ')
  const unknown = (adapter: string | undefined, path: string): OptionsProblem[] => adapter === undefined || known.has(adapter) ? [] : [problem(path, `must be one of ${names}, not ${shown(adapter)}`)]
  const sources = discover.flatMap(({ adapter }, i) => unknown(adapter, `/discover/${i}/adapter`))
  return [...sources, ...nodes.flatMap(({ url, adapter }, i) => {
    const first = nodes.findIndex(node => node.url === url || sameNode(node.url, url))
    return [
      ...urlMistake(url, `/nodes/${i}/url`),
      ...unknown(adapter, `/nodes/${i}/adapter`),
      ...(first === i ? [] : [problem(`/nodes/${i}/url`, `must not be that of nodes[${first}]`)])
    ]
  })]
}

function sourceMistakes ({ discover }: Filled): OptionsProblem[] {
  return discover.flatMap(({ dns, kubernetes, port, server }, i) => [
    ...((dns === undefined) === (kubernetes === undefined) ? [problem(`/discover/${i}`, `must have one of dns and kubernetes, not ${dns === undefined ? 'neither' : 'both'}`)] : []),
    ...(server === undefined || isNameServer(server) ? [] : [problem(`/discover/${i}/server`, `must be an IP address with a port from 1 to 65535, or without one, not ${shown(server)}`)]),
    ...(kubernetes !== undefined && (port ?? server) !== undefined ? [problem(`/discover/${i}/${port === undefined ? 'server' : 'port'}`, 'must stand beside dns; of pods there is kubernetes.port')] : [])
  ])
}

function isNameServer (text: string): boolean {
  const [, host = '', port = '53'] = /^\[?(.*?)\]?(?::(\d+))?$/.exec(text) ?? []
  return isIP(host) !== 0 && Number(port) >= 1 && Number(port) <= 65_535
}

function headerMistakes ({ forwardHeaders }: Filled): OptionsProblem[] {
  return forwardHeaders.flatMap((name, i) => isForwardable(name) ? [] : [problem(`/forwardHeaders/${i}`, `must be none that belongs to a connection, says who a client is, or is the gateway's own, not ${shown(name)}`)])
}

function networkMistakes ({ allowedNetworks }: Filled): OptionsProblem[] {
  return allowedNetworks.flatMap((network, i) => {
    const [address = '', bits = '0'] = network.split('/')
    const family = isIP(address)
    return family !== 0 && Number(bits) <= (family === 4 ? 32 : 128) ? [] : [problem(`/allowedNetworks/${i}`, `must be an IP address or a network such as 10.0.0.0/8, not ${shown(network)}`)]
  })
}

function keyMistakes ({ keys }: Filled): OptionsProblem[] {
  return keys.flatMap(({ name, hash }, i) => {
    const same = (one: (typeof keys)[number]): boolean => one.name === name || one.hash.toLowerCase() === hash.toLowerCase()
    const first = keys.findIndex(same)
    return first === i ? [] : [problem(`/keys/${i}/${keys[first]!.name === name ? 'name' : 'hash'}`, `must not be that of keys[${first}]`)]
  })
}

function urlMistake (url: string, instancePath: string): OptionsProblem[] {
  try {
    checkUrl(url)
    return []
  } catch (err) {
    return [{ instancePath, message: `${dotted(instancePath)}: ${(err as Error).message}` }]
  }
}

function embeddedOf (embedded: EpdOptions['embedded'], { nodes, discover }: Filled): EmbeddedEngines | undefined {
  if (embedded === false || (embedded === undefined && nodes.length + discover.length > 0)) return undefined
  if (typeof embedded !== 'object') return DEFAULT_EMBEDDED
  const { prefill = 0, decode = 0 } = embedded
  return { ...DEFAULT_EMBEDDED, ...(prefill > 0 && decode > 0 ? { engines: 0 } : {}), ...embedded }
}

/** What the schema can't express about embedded engines: some of them must generate. */
function embeddedMistakes ({ engines, prefill, decode }: EmbeddedEngines): OptionsProblem[] {
  if (prefill > 0 && decode === 0) return [problem('/embedded/decode', 'must be >= 1 beside embedded.prefill, not 0')]
  if (decode > 0 && prefill === 0) return [problem('/embedded/prefill', 'must be >= 1 beside embedded.decode, not 0')]
  if (engines === 0 && decode === 0) return [problem('/embedded/engines', 'must be >= 1 without embedded.prefill and embedded.decode, not 0')]
  return []
}

function routesOf (routes: boolean | Partial<RouteOptions>, attach: readonly string[]): RouteOptions {
  // A gateway that attaches its own routes has them, and its own health and metrics, already.
  const own = routes !== false && attach.length === 0
  return { openai: own, nodes: true, sglang: true, vllm: true, health: own, metrics: own, traces: true, ...(typeof routes === 'object' ? routes : {}) }
}

/** Copies plain objects and arrays, because Ajv writes defaults into them. Functions, adapters and instances stay the same. */
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
    // Report a failed choice once, not once for each alternative.
    const choice = choices.find(one => one !== error && one.instancePath === error.instancePath && error.schemaPath.startsWith(one.schemaPath))
    if (choice !== undefined && error.keyword !== 'additionalProperties') continue
    // But an error inside the object that was chosen says more than the choice itself.
    if (error.keyword === 'anyOf' && errors.some(other => within(other, error))) continue
    const found = problemOf(error)
    if (!problems.has(found.instancePath)) problems.set(found.instancePath, found)
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
  return problem(instancePath, `must ${expectation(error)}, not ${shown(data)}`)
}

function problem (instancePath: string, what: string): OptionsProblem {
  return { instancePath, message: `${dotted(instancePath) || 'options'} ${what}` }
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
