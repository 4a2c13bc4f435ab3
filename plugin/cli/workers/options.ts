/** The options of the primary and of its workers, made of those of the configuration. */
import { randomBytes } from 'node:crypto'
import { resolveOptions, type EpdOptions } from '../../options/index.ts'
import type { Shares } from './calls.ts'

export function sharesOf (options: EpdOptions, workers: number): Shares {
  const { vllm, bypass } = resolveOptions(options)
  return { workers, bypass, vllmSecret: vllm.secret ?? randomBytes(32).toString('hex') }
}

/** The primary has the nodes, and answers operators. */
export function optionsOfPrimary (options: EpdOptions): EpdOptions {
  const { routes } = resolveOptions(options)
  return { ...options, routes: { ...routes, openai: false, health: false } }
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
    routes: { openai: routes.openai, health: routes.health, metrics: false, nodes: false, sglang: routes.sglang, vllm: false, traces: false }
  }
}
