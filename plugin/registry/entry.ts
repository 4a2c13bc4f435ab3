import { randomBytes } from 'node:crypto'
import type { Adapter, AdapterNode, NodeInfo, Role } from '../../adapters/adapter.ts'
import { dialUrl } from './address.ts'
import { StageBreakers } from './breaker.ts'
import { Load } from './load.ts'
import type { NodeSpec, NodeState } from './types.ts'

/** A registered node: what was said of it, what a probe found, and how it is used. */
export class Entry {
  readonly id: string
  readonly token = randomBytes(24).toString('hex')
  readonly load = new Load()
  readonly breakers: StageBreakers
  spec: NodeSpec
  adapter: Adapter
  /** Was the adapter found out from this process? True also for a named one. */
  adapterKnown: boolean
  info: NodeInfo | undefined
  state: NodeState = 'unknown'
  /** Why the last probe failed. */
  error: string | undefined
  /** Probes failed in a row. */
  failures = 0
  /** Restarts seen. Tells processes apart that have no epoch. */
  lives = 0
  #node: AdapterNode | undefined

  constructor (spec: NodeSpec, adapter: Adapter, breakers: StageBreakers) {
    this.id = spec.url
    this.spec = spec
    this.adapter = adapter
    this.adapterKnown = spec.adapter !== undefined
    this.breakers = breakers
  }

  get role (): Role {
    return this.info?.role ?? this.spec.role ?? 'hybrid'
  }

  /** A model list that was given counts; only without one the probe's does, as in LMDeploy's proxy. */
  get models (): readonly string[] {
    const given = this.spec.models
    return given !== undefined && given.length > 0 ? given : this.info?.models ?? []
  }

  get notes (): readonly string[] {
    const notes = this.info?.notes ?? []
    return this.error === undefined ? notes : [...notes, this.error]
  }

  /** For adapters; the same object until something it holds changes. The role is the registered one, for probes to compare. */
  get node (): AdapterNode {
    this.#node ??= Object.freeze({
      id: this.id,
      url: dialUrl(this.id, this.spec.peer),
      role: this.info?.role ?? this.spec.role ?? 'hybrid',
      apiKey: this.spec.apiKey,
      vision: this.spec.vision,
      maxPrefillTokens: this.spec.maxPrefillTokens,
      info: this.info
    })
    return this.#node
  }

  /** After any change. */
  touch (): void {
    this.#node = undefined
  }

  /** The process behind the URL is another one: nothing of the old one counts. */
  restarted (): void {
    this.lives++
    this.load.reset()
    this.breakers.reset()
    this.touch()
  }
}
