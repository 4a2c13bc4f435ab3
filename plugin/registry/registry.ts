import { createHash } from 'node:crypto'
import { EventEmitter, setMaxListeners } from 'node:events'
import { AdapterError, type Adapter, type Call, type Link, type NodeInfo, type Stage } from '../../adapters/adapter.ts'
import { checkAdapter, detectAdapter, pytorch, resolveAdapter } from '../../adapters/index.ts'
import { abortable, abortReason } from '../../adapters/abort.ts'
import type { NodeOptions } from '../options/schema.ts'
import type { AddResult, NodeStatus, Registrant, RegistryApi, RegistryOptions, Ticket } from './api.ts'
import { Links } from './links.ts'
import { idleTicket, StageBreakers } from './load.ts'
import { checkUrl, NodeRecord } from './node.ts'
import { checkedInfo, type ProbeOutcome, type ProbeTiming } from './probe.ts'
import { buildSnapshot, statusOf } from './snapshot.ts'
import type { LinkView, NodeSnapshot, RegistrySnapshot } from './types.ts'

/** The nodes of one gateway. Only `remove` forgets a node. */
export class Registry extends EventEmitter<{ change: [RegistrySnapshot] }> implements RegistryApi {
  readonly #options: RegistryOptions
  readonly #extra: readonly Adapter[]
  readonly #timing: ProbeTiming
  readonly #links: Links
  readonly #nodes = new Map<string, NodeRecord>()
  /** Node ids by the hash of their token: the time of a look-up by hash gives nothing away. */
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

  add (node: NodeOptions, from: Registrant = {}): AddResult {
    checkUrl(node.url)
    const options = { ...node, ...from }
    const adapter = node.adapter === undefined ? pytorch : resolveAdapter(node.adapter, this.#extra)
    const known = this.#nodes.get(node.url)
    const record = known ?? this.#create(options, adapter)
    const changed = known === undefined || known.registerAgain(options, adapter)
    if (changed) this.#sync()
    record.probes.trigger(true)
    return { id: record.id, changed, token: record.token }
  }

  remove (id: string): boolean {
    const record = this.#nodes.get(id)
    if (record === undefined) return false
    this.#nodes.delete(id)
    this.#tokens.delete(hash(record.token))
    const left = record.probes.close().finally(() => { this.#leaving.delete(left) })
    this.#leaving.add(left)
    this.#options.log.info({ node: id }, 'node removed')
    this.#sync()
    return true
  }

  get (id: string): NodeSnapshot | undefined {
    return this.snapshot().byId.get(id)
  }

  snapshot (): RegistrySnapshot {
    this.#snapshot ??= buildSnapshot(this.#version, this.#nodes.values(), this.#links.views())
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
    const record = this.#nodes.get(id)
    if (record === undefined) return idleTicket(id, stage)
    return record.load.take(id, stage, tokens, record.breakers.of(stage), () => { record.probes.trigger(false) }, this.#options.onUse)
  }

  reserve (id: string, tokens = 0): () => void {
    return this.#nodes.get(id)?.load.reserve(tokens) ?? (() => {})
  }

  async ensureLink (from: string, to: string, signal?: AbortSignal): Promise<Link> {
    return await this.#links.ensure(this.#registered(from), this.#registered(to), signal)
  }

  linkLost (from: string, to: string): void {
    const [one, other] = [this.#nodes.get(from), this.#nodes.get(to)]
    if (one === undefined || other === undefined) return
    this.#links.lost(one, other)
    // Most often a restart has broken it; the sooner the epochs are known the better.
    one.probes.trigger(false)
    other.probes.trigger(false)
  }

  refuseLinks (from: string, reason: string): void {
    const record = this.#nodes.get(from)
    if (record !== undefined) this.#links.refuse(record, reason)
  }

  async warmUp (): Promise<readonly LinkView[]> {
    return await this.#links.warmUp()
  }

  probe (id: string): void {
    this.#nodes.get(id)?.probes.trigger(true)
  }

  tokenFor (id: string): string | undefined {
    return this.#nodes.get(id)?.token
  }

  isNodeToken (token: string): string | undefined {
    return this.#tokens.get(hash(token))
  }

  status (): Record<string, NodeStatus> {
    return Object.fromEntries(this.snapshot().nodes.map(node => [node.id, statusOf(node, this.#registered(node.id))]))
  }

  async close (): Promise<void> {
    this.#closing.abort(new Error('the registry is closed'))
    const probes = [...this.#nodes.values()].map(async record => { await record.probes.close() })
    await Promise.all([...probes, ...this.#leaving, this.#links.close()])
  }

  #registered (id: string): NodeRecord {
    const record = this.#nodes.get(id)
    if (record !== undefined) return record
    throw new AdapterError('UNAVAILABLE', `${id} is not registered`, { node: id })
  }

  #create (options: NodeOptions & Registrant, adapter: Adapter): NodeRecord {
    const { breakerFailures = 5, breakerCooldown = 10_000, log } = this.#options
    const record = new NodeRecord(options, adapter, new StageBreakers(breakerFailures, breakerCooldown), this.#timing, async (record, signal) => await this.#probe(record, signal))
    this.#nodes.set(record.id, record)
    this.#tokens.set(hash(record.token), record.id)
    log.info({ node: record.id, role: options.role, models: options.models }, 'node registered')
    return record
  }

  #call (signal: AbortSignal): Call {
    return { signal, headers: {}, dispatcher: this.#options.dispatcher, log: this.#options.log }
  }

  async #probe (record: NodeRecord, signal: AbortSignal): Promise<ProbeOutcome> {
    const call = this.#call(signal)
    try {
      if (!record.adapterKnown) record.adapter = resolveAdapter(await detectAdapter(record.forAdapter(), call), this.#extra)
      // The probe compares the registered role with the one that the node reports.
      const info = checkedInfo(await abortable(record.adapter.probe(record.forAdapter(record.registeredRole), call), signal))
      if (this.#nodes.get(record.id) === record) this.#answered(record, info)
      return info.status === 'initialising' ? 'starting' : 'well'
    } catch (error) {
      if (this.#nodes.get(record.id) === record && !this.#closing.signal.aborted) this.#failed(record, error as Error)
      return 'ill'
    }
  }

  #answered (record: NodeRecord, info: NodeInfo): void {
    const { log } = this.#options
    const { id, state, lives } = record
    const changed = record.answered(info)
    if (record.lives !== lives) log.info({ node: id, epoch: info.epoch }, 'node has restarted')
    if (record.state !== state) log.info({ node: id, from: state, to: record.state }, 'node state changed')
    if (changed) this.#sync()
    else this.#links.sync(this.#nodes.values())
  }

  #failed (record: NodeRecord, err: Error): void {
    const { id, state } = record
    if (!record.failed(err)) return
    if (record.state !== state) this.#options.log.warn({ node: id, from: state, err }, 'node is unhealthy')
    this.#sync()
  }

  #sync (): void {
    this.#changed()
    this.#links.sync(this.#nodes.values())
  }

  /** Announces all changes of one turn of the event loop together. */
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
