/** The options of the primary and of its workers, made of those of the configuration. */
import { randomBytes } from 'node:crypto'
import { resolveOptions, type EpdOptions } from '../../options/index.ts'
import { UsageError } from '../usage.ts'
import type { Shares } from './calls.ts'

/** @throws UsageError where a configuration can't have several workers */
export function checkForWorkers ({ nodes = [] }: EpdOptions): void {
  const at = nodes.findIndex(({ adapter, role }) => adapter === 'sglang' && role === 'encoder')
  if (at !== -1) throw new UsageError(`nodes[${at}]: SGLang's language servers call encoders back through the gateway, which works with one process only; leave out --workers, or start several gateways`)
}

export function sharesOf (options: EpdOptions, workers: number): Shares {
  const { vllm, bypass } = resolveOptions(options)
  return { workers, bypass, vllmSecret: vllm.secret ?? randomBytes(32).toString('hex') }
}

/** The primary has the nodes, and answers operators. */
export function optionsOfPrimary (options: EpdOptions): EpdOptions {
  const { routes } = resolveOptions(options)
  return { ...options, routes: { ...routes, openai: false, health: false, sglang: false } }
}

/** A worker serves requests. Loads it sees are its own: it has its share of what a node may have in flight. */
export function optionsOfWorker (options: EpdOptions, { workers, vllmSecret, bypass }: Shares): EpdOptions {
  const { routes, routing } = resolveOptions(options)
  const share = (tokens: number): number => Math.max(1, Math.ceil(tokens / workers))
  return {
    ...options,
    nodes: [],
    discover: [],
    embedded: false,
    bypass,
    ui: false,
    vllm: { ...options.vllm, secret: vllmSecret },
    routing: { ...options.routing, nodeTokens: share(routing.nodeTokens), encoderTokens: share(routing.encoderTokens) },
    routes: { openai: routes.openai, health: routes.health, metrics: false, nodes: false, sglang: false, vllm: false, traces: false }
  }
}
