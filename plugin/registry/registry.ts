import { createHash } from 'node:crypto'
import { EventEmitter, setMaxListeners } from 'node:events'
import { isDeepStrictEqual } from 'node:util'
import { AdapterError, type Adapter, type Call, type ControlRoute, type Link, type NodeInfo, type Stage } from '../../adapters/adapter.ts'
import { adapters as shipped, checkAdapter, detectAdapter, pytorch, resolveAdapter } from '../../adapters/index.ts'
import { abortable, abortReason } from '../abort.ts'
import { checkUrl } from './address.ts'
import { StageBreakers } from './breaker.ts'
import { checkedInfo } from './checked-info.ts'
import { Entry } from './entry.ts'
import { ProbeLoop, type ProbeOutcome, type ProbeTiming } from './health.ts'
import { Links } from './links.ts'
import { idleTicket } from './load.ts'
import { buildSnapshot, statusOf } from './snapshot.ts'
import type { AddResult, LinkView, NodeSnapshot, NodeSpec, NodeStatus, RegistryApi, RegistryOptions, RegistrySnapshot, Ticket } from './types.ts'

/** Causes that leave no doubt; anything else must happen twice in a row before a node counts as unhealthy. */
const CERTAIN = new Set(['ECONNREFUSED', 'ENOTFOUND', 'EHOSTUNREACH', 'ENETUNREACH'])

interface Member {
  readonly entry: Entry
  readonly loop: ProbeLoop
}

/** The nodes of one gateway. Nothing but `remove` ever forgets a node. */
export class Registry extends EventEmitter<{ change: [RegistrySnapshot] }> implements RegistryApi {
  readonly #options: RegistryOptions
  readonly #extra: readonly Adapter[]
  readonly #timing: ProbeTiming
  readonly #links: Links
  readonly #members = new Map<string, Member>()
  /** Node ids by the hash of their token: a look-up by hash tells nothing by its timing. */
  readonly #tokens = new Map<string, string>()
  readonly #leaving = new Set<Promise<void>>()
  readonly #closing = new AbortController()
  #version = 0
  #snapshot: RegistrySnapshot | undefined
  #announced = false

  constructor (options: RegistryOptions) {
    super()
    setMaxListeners(0, this, this.#closing.signal)
    for (const adapter of options.adapters ?? []) checkAdapter(adapter)
    this.#options = options
    this.#extra = options.adapters ?? []
    this.#timing = {
      interval: options.probeInterval ?? 5000,
      backoff: options.probeBackoff ?? 1000,
      backoffMax: options.probeBackoffMax ?? 10_000,
      timeout: options.probeTimeout ?? 15_000
    }
    this.#links = new Links({
      call: signal => this.#call(signal),
      timeout: options.linkTimeout ?? 10_000,
      backoff: this.#timing.backoff,
      backoffMax: this.#timing.backoffMax,
      onChange: () => { this.#changed() }
    })
  }

  add (spec: NodeSpec): AddResult {
    checkUrl(spec.url)
    const adapter = spec.adapter === undefined ? pytorch : resolveAdapter(spec.adapter, this.#extra)
    const member = this.#members.get(spec.url)
    if (member !== undefined) return this.#addAgain(member, spec, adapter)
    const entry = new Entry(Object.freeze({ ...spec }), adapter, new StageBreakers(this.#options.breakerFailures ?? 5, this.#options.breakerCooldown ?? 10_000))
    const loop = new ProbeLoop(this.#timing, async signal => await this.#probe(entry, signal))
    this.#members.set(entry.id, { entry, loop })
    this.#tokens.set(hash(entry.token), entry.id)
    this.#options.log.info({ node: entry.id, role: spec.role, models: spec.models }, 'node registered')
    this.#changed()
    loop.trigger(true)
    return { id: entry.id, changed: true, token: entry.token }
  }

  remove (id: string): boolean {
    const member = this.#members.get(id)
    if (member === undefined) return false
    this.#members.delete(id)
    this.#tokens.delete(hash(member.entry.token))
    const left = member.loop.close().finally(() => { this.#leaving.delete(left) })
    this.#leaving.add(left)
    this.#options.log.info({ node: id }, 'node removed')
    this.#sync()
    return true
  }

  get (id: string): NodeSnapshot | undefined {
    return this.snapshot().byId.get(id)
  }

  snapshot (): RegistrySnapshot {
    this.#snapshot ??= buildSnapshot(this.#version, this.#entries(), this.#links.views())
    return this.#snapshot
  }

  waitFor (check: (snapshot: RegistrySnapshot) => boolean, options: { signal?: AbortSignal | undefined } = {}): Promise<RegistrySnapshot> {
    const signals = [this.#closing.signal, ...(options.signal === undefined ? [] : [options.signal])]
    return new Promise((resolve, reject) => {
      const done = (): void => {
        this.off('change', look)
        for (const signal of signals) signal.removeEventListener('abort', stop)
      }
      const stop = (): void => {
        done()
        reject(abortReason(signals.find(signal => signal.aborted)))
      }
      const look = (snapshot: RegistrySnapshot): void => {
        if (!check(snapshot)) return
        done()
        resolve(snapshot)
      }
      if (signals.some(signal => signal.aborted)) { stop(); return }
      this.on('change', look)
      for (const signal of signals) signal.addEventListener('abort', stop)
      look(this.snapshot())
    })
  }

  acquire (id: string, stage: Stage, tokens = 0): Ticket {
    const member = this.#members.get(id)
    if (member === undefined) return idleTicket(id, stage)
    const { entry, loop } = member
    return entry.load.take(id, stage, tokens, entry.breakers.of(stage), () => { loop.trigger(false) }, this.#options.onUse)
  }

  reserve (id: string, tokens = 0): () => void {
    return this.#members.get(id)?.entry.load.reserve(tokens) ?? (() => {})
  }

  async ensureLink (from: string, to: string, signal?: AbortSignal): Promise<Link> {
    return await this.#links.ensure(this.#entry(from), this.#entry(to), signal)
  }

  linkLost (from: string, to: string): void {
    const [one, other] = [this.#members.get(from), this.#members.get(to)]
    if (one === undefined || other === undefined) return
    this.#links.lost(one.entry, other.entry)
    // Why it was lost is most often a restart; the sooner the epochs are known the better.
    one.loop.trigger(false)
    other.loop.trigger(false)
  }

  refuseLinks (from: string, reason: string): void {
    const member = this.#members.get(from)
    if (member !== undefined) this.#links.refuse(member.entry, reason)
  }

  async warmUp (): Promise<readonly LinkView[]> {
    return await this.#links.warmUp()
  }

  probe (id: string): void {
    this.#members.get(id)?.loop.trigger(true)
  }

  tokenFor (id: string): string | undefined {
    return this.#members.get(id)?.entry.token
  }

  isNodeToken (token: string): string | undefined {
    return this.#tokens.get(hash(token))
  }

  status (): Record<string, NodeStatus> {
    return Object.fromEntries(this.snapshot().nodes.map(node => {
      const { spec, load } = this.#entry(node.id)
      return [node.id, statusOf(node, spec.speed, load.latencies)]
    }))
  }

  controlRoutes (): readonly ControlRoute[] {
    return [...shipped.values(), ...this.#extra].flatMap(adapter => adapter.control ?? [])
  }

  async close (): Promise<void> {
    this.#closing.abort(new Error('the registry is closed'))
    const members = [...this.#members.values()]
    await Promise.all([...members.map(async ({ loop }) => { await loop.close() }), ...this.#leaving, this.#links.close()])
  }

  * #entries (): Iterable<Entry> {
    for (const { entry } of this.#members.values()) yield entry
  }

  #entry (id: string): Entry {
    const member = this.#members.get(id)
    if (member !== undefined) return member.entry
    throw new AdapterError('UNAVAILABLE', `${id} is not registered`, { node: id })
  }

  #call (signal: AbortSignal): Call {
    return { signal, headers: {}, dispatcher: this.#options.dispatcher, log: this.#options.log }
  }

  /** LMDeploy's api_servers register once, at their start; ours repeat it as a heartbeat. */
  #addAgain ({ entry, loop }: Member, spec: NodeSpec, adapter: Adapter): AddResult {
    const old = entry.spec
    const merged: NodeSpec = old.configured === true && spec.configured !== true
      ? { ...old, ...(spec.peer === undefined ? {} : { peer: spec.peer }) }
      : { ...old, ...Object.fromEntries(Object.entries(spec).filter(([, value]) => value !== undefined)), url: old.url }
    const changed = !isDeepStrictEqual(merged, old)
    if (changed) {
      entry.spec = Object.freeze(merged)
      if (spec.adapter !== undefined && adapter !== entry.adapter) Object.assign(entry, { adapter, adapterKnown: true, info: undefined, state: 'unknown' })
      entry.touch()
      this.#sync()
    }
    // A server without an epoch tells a restart in no other way.
    if (entry.info !== undefined && entry.info.epoch === undefined) this.#restarted(entry)
    loop.trigger(true)
    return { id: entry.id, changed, token: entry.token }
  }

  #restarted (entry: Entry): void {
    entry.info = undefined
    entry.adapterKnown = entry.spec.adapter !== undefined
    entry.restarted()
  }

  async #probe (entry: Entry, signal: AbortSignal): Promise<ProbeOutcome> {
    const call = this.#call(signal)
    try {
      if (!entry.adapterKnown) entry.adapter = resolveAdapter(await detectAdapter(entry.node, call), this.#extra)
      const info = checkedInfo(await abortable(entry.adapter.probe(this.#asRegistered(entry), call), signal))
      if (this.#members.get(entry.id)?.entry === entry) this.#up(entry, info)
      return info.status === 'initialising' ? 'starting' : 'well'
    } catch (error) {
      if (this.#members.get(entry.id)?.entry === entry && !this.#closing.signal.aborted) this.#down(entry, error as Error)
      return 'ill'
    }
  }

  /** The probe compares the registered role with the node's own word. */
  #asRegistered (entry: Entry): Entry['node'] {
    const role = entry.spec.role ?? 'hybrid'
    return entry.node.role === role ? entry.node : { ...entry.node, role }
  }

  #up (entry: Entry, info: NodeInfo): void {
    const known = entry.info
    entry.failures = 0
    entry.adapterKnown = info.status === 'healthy' || entry.spec.adapter !== undefined
    if (known !== undefined && known.epoch !== info.epoch) {
      entry.restarted()
      this.#options.log.info({ node: entry.id, epoch: info.epoch }, 'node has restarted')
    }
    if (entry.state === info.status && entry.error === undefined && isDeepStrictEqual(known, info)) {
      this.#links.sync(this.#entries())
      return
    }
    if (entry.state !== info.status) this.#options.log.info({ node: entry.id, from: entry.state, to: info.status }, 'node state changed')
    Object.assign(entry, { info, state: info.status, error: undefined })
    entry.touch()
    this.#sync()
  }

  #down (entry: Entry, error: Error): void {
    entry.failures++
    const cause = (error as { cause?: { code?: unknown } }).cause?.code
    const doubtful = entry.state === 'healthy' && entry.failures < 2 && !(typeof cause === 'string' && CERTAIN.has(cause))
    if (doubtful || (entry.state === 'unhealthy' && entry.error === error.message)) return
    if (entry.state !== 'unhealthy') this.#options.log.warn({ node: entry.id, from: entry.state, err: error }, 'node is unhealthy')
    Object.assign(entry, { state: 'unhealthy', error: error.message })
    // What has an epoch tells by itself, when it is back, whether it is another process.
    if (entry.info !== undefined && entry.info.epoch === undefined) this.#restarted(entry)
    else entry.touch()
    this.#sync()
  }

  #sync (): void {
    this.#changed()
    this.#links.sync(this.#entries())
  }

  /** Announces once per turn of the event loop, however much has changed in it. */
  #changed (): void {
    this.#version++
    this.#snapshot = undefined
    if (this.#announced) return
    this.#announced = true
    queueMicrotask(() => {
      this.#announced = false
      if (!this.#closing.signal.aborted) this.emit('change', this.snapshot())
    })
  }
}

function hash (token: string): string {
  return createHash('sha256').update(token).digest('base64')
}
