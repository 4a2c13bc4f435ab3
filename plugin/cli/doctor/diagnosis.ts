/** Which nodes can work together, what a gateway in front of them can serve, and what is missing. Pure functions of what was found. */
import type { NodeInfo, Role } from '../../../adapters/adapter.ts'
import { canExchange, sameEngine, sameFingerprint, type LinkState, type NodeState } from '../../registry/index.ts'

/** A node, by what it says of itself and what a gateway has found. */
export interface Patient {
  readonly id: string
  readonly role: Role
  readonly adapter: string
  readonly models: readonly string[]
  readonly state: NodeState
  /** Why it is limited or not healthy. */
  readonly notes: readonly string[]
  /** Undefined before its first good answer. */
  readonly info: NodeInfo | undefined
  /** Stages whose breaker is open. */
  readonly resting: readonly string[]
  /** Links by the other node's id, where a gateway has tried to make them. */
  readonly links: ReadonlyMap<string, { readonly state: LinkState, readonly reason?: string | undefined, readonly transport?: string | undefined }>
}

export interface PairFinding {
  readonly from: string
  readonly to: string
  readonly what: 'features' | 'KV blocks'
  readonly works: boolean
  /** How they exchange, or why they do not. */
  readonly how: string
}

export interface ModelFinding {
  readonly model: string
  /** Plans for text and for requests with media, and by what; empty: none. */
  readonly text: readonly string[]
  readonly media: readonly string[]
}

export interface Problem {
  readonly what: string
  /** What helps. */
  readonly remedy: string
}

export interface Diagnosis {
  readonly nodes: readonly Patient[]
  readonly pairs: readonly PairFinding[]
  readonly models: readonly ModelFinding[]
  readonly problems: readonly Problem[]
  /** What can't be seen from outside, or is only worth knowing. */
  readonly hints: readonly string[]
}

const LMDEPLOY_MEDIA = 'LMDeploy has no encoder role and takes no features over HTTP: its pictures stay with the language model'
const NO_DISAGGREGATION = 'the adapter openai does no disaggregation: name the adapter of the server (vllm, sglang, pytorch)'
const TWICE = 'its load is counted apart, and a drain of one leaves the other'
const VLLM_CONNECTORS = 'vLLM reports no connectors. Encoders need --ec-transfer-config with ec_producer, those that take their features ec_consumer with the same storage; prefill and decode need --kv-transfer-config with kv_producer and kv_consumer. Without them each server encodes and prefills by itself, and answers right (docs/vllm.md)'

export function diagnose (nodes: readonly Patient[]): Diagnosis {
  const pairs = nodes.flatMap(from => nodes.flatMap(to => pairOf(from, to) ?? []))
  const models = [...new Set(nodes.flatMap(node => node.models))].map(model => modelOf(model, nodes, pairs))
  const problems = [...nodes.flatMap(ill), ...nodes.flatMap(twice), ...nodes.flatMap(node => lonely(node, nodes, pairs)), ...models.flatMap(model => unserved(model, nodes))]
  return { nodes, pairs, models, problems, hints: [...nodes.flatMap(plainly), ...(nodes.filter(({ adapter }) => adapter === 'vllm').length > 1 ? [VLLM_CONNECTORS] : [])] }
}

/** A server that an adapter of its own knows better. */
function plainly ({ id, adapter, info }: Patient): string[] {
  const [, owner] = /^openai \((fastify-epd|vllm|sglang|lmdeploy)\)$/.exec(info?.backend ?? '') ?? []
  return adapter !== 'openai' || owner === undefined ? [] : [`${id} is a server of ${owner}: without adapter in its entry the right one is found, and it can take part in disaggregation`]
}

function pairOf (from: Patient, to: Patient): PairFinding | undefined {
  const what = exchanged(from.role, to.role)
  if (what === undefined) return undefined
  const finding = (works: boolean, how: string): PairFinding => ({ from: from.id, to: to.id, what, works, how })
  const down = [from, to].find(({ state }) => state !== 'healthy')
  if (down !== undefined) return finding(false, `${down.id} is ${down.state}`)
  const pushed = from.info?.produces.find(format => format.startsWith('push:') && to.info?.accepts.includes(format) === true)
  if (pushed !== undefined && fits(from, to)) return finding(true, 'the language server calls the encoder through the gateway')
  if (!fits(from, to)) return finding(false, `they serve different models: ${from.models.join(', ')} and ${to.models.join(', ')}`)
  if (!canExchange(from, to)) return finding(false, mismatch(from, to, what))
  if (!sameFingerprint(from, to)) return finding(false, `their versions, models or processors differ (${from.info?.fingerprint} and ${to.info?.fingerprint})`)
  const link = from.links.get(to.id)
  if (link?.state === 'refused' || link?.state === 'failed') return finding(false, `link ${link.state}: ${link.reason ?? 'no reason'}`)
  const format = from.info!.produces.find(format => to.info!.accepts.includes(format))!
  return finding(true, link?.state === 'linked' ? `${format}, linked over ${link.transport}` : link === undefined ? `${format}; no link was tried` : `${format}, ${link.state}`)
}

function exchanged (from: Role, to: Role): PairFinding['what'] | undefined {
  if (from === 'encoder') return to === 'hybrid' || to === 'prefill' ? 'features' : undefined
  return from === 'prefill' && to === 'decode' ? 'KV blocks' : undefined
}

/** Is there a model of both? An encoder without a list, such as SGLang's, serves any. */
function fits (from: Patient, to: Patient): boolean {
  return (from.role === 'encoder' && from.models.length === 0) || from.models.some(model => to.models.includes(model))
}

/** Why they have no format in common. */
function mismatch (from: Patient, to: Patient, what: PairFinding['what']): string {
  const of = (formats: readonly string[] | undefined): string[] => (formats ?? []).filter(format => /^(features|push):/.test(format) === (what === 'features'))
  const [produced, accepted] = [of(from.info?.produces), of(to.info?.accepts)]
  if (produced.length === 0) return `${from.id} hands no ${what} on: ${lack(from, what)}`
  if (accepted.length === 0) return `${to.id} takes no ${what}: ${lack(to, what)}`
  return `one sends ${produced.join(', ')}, the other takes ${accepted.join(', ')}: use servers of one kind`
}

/** What a backend lacks, or must be started with. */
function lack ({ adapter, role, info, notes }: Patient, what: PairFinding['what']): string {
  if (adapter === 'openai') return NO_DISAGGREGATION
  if (adapter === 'turbomind' && what === 'KV blocks') return 'TurboMind has no disaggregated prefill and decode: use the PyTorch engine'
  if (info?.backend.startsWith('lmdeploy') === true && what === 'features') return LMDEPLOY_MEDIA
  if (adapter === 'sglang' && what === 'features') return 'start SGLang\'s language server with --language-only and --encoder-urls GATEWAY/sglang/v/0 (docs/sglang.md)'
  if (adapter === 'sglang') return `start it with --disaggregation-mode ${role}`
  return notes.length > 0 ? notes.join('; ') : `${info?.backend ?? adapter} has none in role ${role}`
}

function modelOf (model: string, all: readonly Patient[], pairs: readonly PairFinding[]): ModelFinding {
  const nodes = all.filter(node => node.state === 'healthy' && (node.models.includes(model) || (node.role === 'encoder' && node.models.length === 0)))
  const ids = new Set(nodes.map(({ id }) => id))
  const good = pairs.filter(({ works, from, to }) => works && ids.has(from) && ids.has(to))
  const roleOf = (id: string): Role | undefined => nodes.find(node => node.id === id)?.role
  const counted = (count: number, text: string, noun: string): string[] => count === 0 ? [] : [`${text} (${count} ${noun}${count === 1 ? '' : 's'})`]
  const alone = nodes.filter(({ role, info }) => role === 'hybrid' || (role === 'decode' && info?.standalone === true))
  const handOver = good.filter(({ what }) => what === 'KV blocks')
  const fed = good.filter(({ what, to }) => what === 'features' && roleOf(to) === 'hybrid')
  // Features go to P, which must have a D of its own.
  const chains = good.filter(({ what, to }) => what === 'features' && roleOf(to) === 'prefill' && handOver.some(({ from }) => from === to))
  return {
    model,
    text: [...counted(alone.length, 'pd', 'node'), ...counted(handOver.length, 'p-d', 'pair')],
    media: [...counted(fed.length, 'e-pd', 'pair'), ...counted(chains.length, 'e-p-d', 'chain'), ...counted(alone.filter(({ info }) => info?.vision === 'full').length, 'hybrid, without encoder', 'node')]
  }
}

function ill ({ id, state, notes, resting }: Patient): Problem[] {
  const why = notes.length === 0 ? '' : `: ${notes.join('; ')}`
  if (state === 'unhealthy' || state === 'unknown') return [{ what: `${id} is ${state}${why}`, remedy: 'start it, or correct its url, apiKey or adapter in the configuration' }]
  if (state === 'initialising' || state === 'sleeping') return [{ what: `${id} is ${state}${why}`, remedy: state === 'sleeping' ? 'wake it up' : 'wait until it has loaded its model, then ask again' }]
  return resting.length > 0 ? [{ what: `${id} rests after failures (${resting.join(', ')})`, remedy: 'fastify-epd trace --last 20 --errors shows what failed' }] : []
}

function twice (node: Patient, at: number, nodes: readonly Patient[]): Problem[] {
  const first = nodes.slice(0, at).find(other => sameEngine(other, node))
  return first === undefined ? [] : [{ what: `${node.id} and ${first.id} are one engine under two URLs`, remedy: `${TWICE}: remove one; in the configuration write the URL with which the engine registers` }]
}

/** A node that is well and of no use. */
function lonely (node: Patient, nodes: readonly Patient[], pairs: readonly PairFinding[]): Problem[] {
  const { id, role, state, info } = node
  if (state !== 'healthy' || role === 'hybrid' || (role === 'decode' && info?.standalone === true)) return []
  // P both takes and gives; what it gives makes it useful.
  const own = pairs.filter(({ from, to }) => role === 'decode' ? to === id : from === id)
  if (own.some(({ works }) => works)) return []
  const partner = { encoder: 'hybrid or prefill', prefill: 'decode', decode: 'prefill' }[role]
  if (own.length === 0) return [{ what: `${id} (${role}) is of no use: there is no ${partner} node`, remedy: `add one, or ${role === 'encoder' ? 'remove it' : 'start it without disaggregation, as hybrid'}` }]
  return [{ what: `${id} (${role}) is of no use: it can work with no ${partner} node`, remedy: [...new Set(own.map(({ how }) => how))].join('; ') }]
}

function unserved ({ model, text, media }: ModelFinding, nodes: readonly Patient[]): Problem[] {
  if (text.length > 0) return media.length > 0 || !nodes.some(node => node.role === 'encoder') ? [] : [{ what: `no node can answer requests with pictures for ${model}, though there are encoders`, remedy: 'see the pairs: each encoder needs a language model that takes its features' }]
  const own = nodes.filter(node => node.role !== 'encoder' && node.models.includes(model))
  return [{ what: `no node can answer requests for ${model}`, remedy: own.length === 0 ? 'only encoders have it: add a hybrid node, or prefill and decode nodes, of this model' : 'its nodes are not healthy, or do not fit together: see above' }]
}
