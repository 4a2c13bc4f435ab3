import { randomBytes } from 'node:crypto'
import { isDeepStrictEqual } from 'node:util'
import type { Adapter, AdapterNode, Log, NodeInfo, Role, Stage } from '../../adapters/adapter.ts'
import type { NodeOptions } from '../options/schema.ts'
import type { Registrant, Ticket } from './api.ts'
import { Load, type StageBreakers, type UseListener } from './load.ts'
import { dialUrl } from './node-url.ts'
import { ProbeLoop, type ProbeOutcome, type ProbeTiming } from './probe.ts'
import type { NodeState } from './types.ts'

/** Causes that leave no doubt; any other failure must happen twice in a row before a node counts as unhealthy. */
const CERTAIN = new Set(['ECONNREFUSED', 'ENOTFOUND', 'EHOSTUNREACH', 'ENETUNREACH'])

export function isCertain (error: unknown): boolean {
  const { code } = ((error as Error).cause ?? {}) as { code?: unknown }
  return typeof code === 'string' && CERTAIN.has(code)
}

/** How long a node that has cut a connection may take to show that it is alive, in milliseconds. */
export const ASK_MS = 2_000

/** A registered node: what the operator says of it, what its probes found, and how it is used. The registry's own record; others see snapshots. */
export class NodeRecord {
  readonly id: string
  readonly token = randomBytes(24).toString('hex')
  readonly load = new Load()
  readonly breakers: StageBreakers
  readonly probes: ProbeLoop
  readonly uses: UseListener
  options: NodeOptions & Registrant
  adapter: Adapter
  /** Is the adapter named, or detected from the running process? */
  adapterKnown: boolean
  info: NodeInfo | undefined
  state: NodeState = 'unknown'
  /** By an operator: it gets no further requests, whatever its probes say. */
  drained = false
  /** Why the last probe failed. */
  error: string | undefined
  /** Restarts seen. Distinguishes processes that have no epoch. */
  lives = 0
  /** Probes failed in a row. */
  #failures = 0

  /** @param probe never rejects */
  constructor (options: NodeOptions & Registrant, adapter: Adapter, breakers: StageBreakers, timing: ProbeTiming, probe: (record: NodeRecord, signal: AbortSignal) => Promise<ProbeOutcome>, log?: Log) {
    this.id = options.url
    this.options = options
    this.adapter = adapter
    this.adapterKnown = options.adapter !== undefined
    this.breakers = breakers
    this.probes = new ProbeLoop(timing, async signal => await probe(this, signal))
    this.uses = {
      failed: () => { this.probes.trigger(false) },
      breaker: (stage, state) => { log?.warn({ node: this.id, stage, breaker: state }, 'breaker changed') },
      alive: async () => await this.#lives()
    }
  }

  /** Not when it is certain: nothing listens, or another process does. A node that was draining, or has been removed, has ended on purpose. */
  async #lives (): Promise<boolean> {
    const { lives, state } = this
    const outcome = await this.probes.ask(ASK_MS)
    return this.drained || state === 'draining' || outcome === 'ill' || outcome === 'closed' || (outcome !== 'dead' && this.lives === lives)
  }

  get registeredRole (): Role {
    return this.options.role ?? 'hybrid'
  }

  get role (): Role {
    return this.info?.role ?? this.registeredRole
  }

  /** The operator's list if there is one, else the probe's, as in LMDeploy's proxy. */
  get models (): readonly string[] {
    const { models } = this.options
    return models !== undefined && models.length > 0 ? models : this.info?.models ?? []
  }

  get notes (): readonly string[] {
    const notes = this.info?.notes ?? []
    return this.error === undefined ? notes : [...notes, this.error]
  }

  /** What adapters are called with. */
  forAdapter (role = this.role): AdapterNode {
    const { apiKey, vision, maxPrefillTokens, ecZmqAddrs, peer } = this.options
    return Object.freeze({ id: this.id, url: dialUrl(this.id, peer), role, apiKey, vision, maxPrefillTokens, ecZmqAddrs, info: this.info })
  }

  /**
   * The node registers again: LMDeploy's api_servers do at their start, ours as a heartbeat. What it leaves out stays;
   * a registration over HTTP does not alter a configured node.
   *
   * @returns whether anything changed
   */
  registerAgain (options: NodeOptions & Registrant, adapter: Adapter): boolean {
    const old = this.options
    const said = Object.fromEntries(Object.entries(old.configured === true && options.configured !== true ? { peer: options.peer } : options).filter(([, value]) => value !== undefined))
    const merged = { ...old, ...said, url: old.url }
    const changed = !isDeepStrictEqual(merged, old)
    this.options = merged
    if (changed && options.adapter !== undefined && adapter !== this.adapter) Object.assign(this, { adapter, adapterKnown: true, info: undefined, state: 'unknown' })
    // Registering is the only sign of a restart that a server without an epoch gives.
    this.#maybeRestarted()
    return changed
  }

  /** The configuration says something else of the node: what it leaves out is gone. @returns whether anything changed */
  configure (options: NodeOptions, adapter: Adapter): boolean {
    const { peer } = this.options
    const next: NodeOptions & Registrant = { ...options, url: this.id, configured: true, ...(peer === undefined ? {} : { peer }) }
    if (isDeepStrictEqual(next, this.options)) return false
    this.options = next
    if (options.adapter !== undefined && adapter !== this.adapter) Object.assign(this, { adapter, adapterKnown: true, info: undefined, state: 'unknown' })
    return true
  }

  /** A probe has answered. @returns whether anything changed */
  answered (info: NodeInfo): boolean {
    const known = this.info
    this.#failures = 0
    this.adapterKnown = info.status === 'healthy' || this.options.adapter !== undefined
    if (known !== undefined && known.epoch !== info.epoch) this.#restarted()
    const changed = this.state !== info.status || this.error !== undefined || !isDeepStrictEqual(steady(known), steady(info))
    if (changed) Object.assign(this, { info, state: info.status, error: undefined })
    return changed
  }

  /** A probe has failed. @returns whether anything changed */
  failed (error: Error): boolean {
    this.#failures++
    const doubtful = this.state === 'healthy' && this.#failures < 2 && !isCertain(error)
    if (doubtful || (this.state === 'unhealthy' && this.error === error.message)) return false
    Object.assign(this, { state: 'unhealthy', error: error.message })
    this.#maybeRestarted()
    return true
  }

  /** Without an epoch a node that was away counts as restarted; an epoch shows by itself whether it was. */
  #maybeRestarted (): void {
    if (this.info === undefined || this.info.epoch !== undefined) return
    this.info = undefined
    this.adapterKnown = this.options.adapter !== undefined
    this.#restarted()
  }

  /** Another process is behind the URL: nothing of the old one counts. */
  #restarted (): void {
    this.lives++
    this.load.reset()
    this.breakers.reset()
  }
}

/** Servers draw a card's time and its permission's id anew for each answer: with them each probe would count as a change. */
function steady (info: NodeInfo | undefined): NodeInfo | undefined {
  return info?.cards === undefined ? info : { ...info, cards: info.cards.map(({ created: _created, permission: _permission, ...card }) => card) }
}

/** For a node that was removed between plan and use. */
export function idleTicket (node: string, stage: Stage): Ticket {
  return { node, stage, ok: () => {}, encoded: () => {}, end: () => {}, killed: async () => false }
}
