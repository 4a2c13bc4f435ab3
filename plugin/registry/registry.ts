import { createHash } from 'node:crypto'
import type { Adapter, Call, Link, NodeInfo, Role, Stage } from '../../adapters/adapter.ts'
import { checkAdapter, detectAdapter, pytorch, resolveAdapter } from '../../adapters/index.ts'
import { abortable, abortReason } from '../../adapters/abort.ts'
import type { NodeOptions } from '../options/schema.ts'
import type { AddResult, NodeChanges, NodeStatus, Registrant, RegistryApi, RegistryOptions, SavedNodes } from './api.ts'
import { Links, sameEngine } from './links.ts'
import { StageBreakers } from './load.ts'
import { ASK_MS, isCertain, NodeRecord } from './node.ts'
import { checkUrl, sameNode } from './node-url.ts'
import { checkedInfo, type ProbeOutcome, type ProbeTiming } from './probe.ts'
import { sourceOf, statusOf } from './snapshot.ts'
import { NodeTable } from './table.ts'
import type { LinkView, NodeSnapshot, RegistrySnapshot } from './types.ts'

const STAGES: readonly Stage[] = ['encode', 'prefill', 'decode']
/** The stages at which nodes of a role are used. */
const USES: Readonly<Record<Role, readonly Stage[]>> = { encoder: ['encode'], prefill: ['prefill'], decode: ['decode'], hybrid: ['decode'] }

/** The nodes of one gateway: they come and go, are probed and linked. Only `remove` forgets a node. */
export class Registry extends NodeTable implements RegistryApi {
  readonly #options: RegistryOptions
  readonly #extra: readonly Adapter[]
  readonly #timing: ProbeTiming
  readonly #links: Links
  /** Node ids by the hash of their token: the time of a look-up by hash gives nothing away. */
  readonly #tokens = new Map<string, string>()
  readonly #leaving = new Set<Promise<void>>()

  constructor (options: RegistryOptions) {
    super(options.stages)
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
      onChange: () => { this.changed() }
    })
  }

  add (node: NodeOptions, from: Registrant = {}): AddResult {
    checkUrl(node.url)
    const options = { ...node, ...from }
    const adapter = this.#adapterOf(node)
    const known = this.#find(node.url)
    const record = known ?? this.#create(options, adapter)
    const changed = known === undefined || known.registerAgain(options, adapter)
    if (changed) this.#sync(record)
    record.probes.trigger(true)
    return { id: record.id, changed, token: record.token }
  }

  override get (url: string): NodeSnapshot | undefined {
    const known = super.get(url) ?? this.#find(url)
    return known === undefined ? undefined : super.get(known.id)
  }

  async ask (id: string): Promise<boolean> {
    const outcome = await this.records.get(id)?.probes.ask(ASK_MS)
    return outcome === 'well' || outcome === 'starting'
  }

  restOf (model: string): number | undefined {
    const ofModel = [...this.records.values()].filter(record => record.models.includes(model))
    const rests = STAGES.map(stage => ofModel.filter(({ role }) => USES[role].includes(stage)).map(({ breakers }) => breakers.of(stage).rest)).filter(all => all.length > 0 && !all.includes(0))
    return rests.length === 0 ? undefined : Math.ceil(Math.max(...rests.map(all => Math.min(...all))) / 1_000)
  }

  remove (url: string): boolean {
    const record = this.#find(url)
    if (record === undefined) return false
    const { id } = record
    this.records.delete(id)
    this.#tokens.delete(hash(record.token))
    const left = record.probes.close().finally(() => { this.#leaving.delete(left) })
    this.#leaving.add(left)
    this.#options.log.info({ node: id }, 'node removed')
    this.changed()
    this.#links.remove(record)
    return true
  }

  drain (url: string, on: boolean): boolean {
    const record = this.#find(url)
    if (record === undefined) return false
    if (record.drained === on) return true
    record.drained = on
    this.#options.log.info({ node: record.id }, on ? 'node is drained' : 'node takes requests again')
    this.#sync(record)
    return true
  }

  configure (nodes: readonly NodeOptions[]): NodeChanges {
    const changes = { added: [] as string[], removed: [] as string[], changed: [] as string[] }
    const kept = new Set(nodes.map(node => this.#find(node.url)))
    for (const record of [...this.records.values()]) {
      if (record.options.configured === true && !kept.has(record) && this.remove(record.id)) changes.removed.push(record.id)
    }
    for (const node of nodes) {
      const known = this.#find(node.url)
      if (known === undefined) changes.added.push(this.add(node, { configured: true }).id)
      else if (known.configure(node, this.#adapterOf(node))) {
        changes.changed.push(known.id)
        this.#sync(known)
      }
    }
    for (const id of changes.changed) this.probe(id)
    return changes
  }

  saved (): SavedNodes {
    const records = [...this.records.values()]
    const lasting = records.filter(({ options }) => options.transient !== true && options.discovered === undefined)
    return {
      nodes: lasting.filter(({ options }) => options.configured !== true).map(({ options }) => options),
      drained: lasting.filter(({ drained }) => drained).map(({ id }) => id)
    }
  }

  sourceOf (id: string): string | undefined {
    const record = this.records.get(id)
    return record === undefined ? undefined : sourceOf(record)
  }

  listed (): SavedNodes {
    const records = [...this.records.values()]
    return { nodes: records.map(({ options: { configured: _configured, transient: _transient, discovered: _discovered, ...node } }) => node), drained: records.filter(({ drained }) => drained).map(({ id }) => id) }
  }

  waitFor (check: (snapshot: RegistrySnapshot) => boolean, options: { signal?: AbortSignal | undefined } = {}): Promise<RegistrySnapshot> {
    const signals = [this.closing.signal, ...(options.signal === undefined ? [] : [options.signal])]
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

  async ensureLink (from: string, to: string, signal?: AbortSignal): Promise<Link> {
    return await this.#links.ensure(this.registered(from), this.registered(to), signal)
  }

  linkLost (from: string, to: string): void {
    const [one, other] = [this.records.get(from), this.records.get(to)]
    if (one === undefined || other === undefined) return
    this.#links.lost(one, other)
    // Most often a restart has broken it; the sooner the epochs are known the better.
    one.probes.trigger(false)
    other.probes.trigger(false)
  }

  refuseLinks (from: string, reason: string): void {
    const record = this.records.get(from)
    if (record !== undefined) this.#links.refuse(record, reason)
  }

  async warmUp (): Promise<readonly LinkView[]> {
    return await this.#links.warmUp()
  }

  probe (id: string): void {
    this.records.get(id)?.probes.trigger(true)
  }

  tokenFor (id: string): string | undefined {
    return this.records.get(id)?.token
  }

  isNodeToken (token: string): string | undefined {
    return this.#tokens.get(hash(token))
  }

  status (): Record<string, NodeStatus> {
    return Object.fromEntries(this.snapshot().nodes.map(node => [node.id, statusOf(node, this.registered(node.id))]))
  }

  async close (): Promise<void> {
    this.closing.abort(new Error('the registry is closed'))
    const probes = [...this.records.values()].map(async record => { await record.probes.close() })
    await Promise.all([...probes, ...this.#leaving, this.#links.close()])
  }

  #adapterOf ({ adapter }: NodeOptions): Adapter {
    return adapter === undefined ? pytorch : resolveAdapter(adapter, this.#extra)
  }

  /** By any spelling of its URL. */
  #find (url: string): NodeRecord | undefined {
    return this.records.get(url) ?? [...this.records.values()].find(({ id }) => sameNode(id, url))
  }

  #create (options: NodeOptions & Registrant, adapter: Adapter): NodeRecord {
    const { breakerFailures = 5, breakerCooldown = 10_000, log } = this.#options
    const record = new NodeRecord(options, adapter, new StageBreakers(breakerFailures, breakerCooldown), this.#timing, async (record, signal) => await this.#probe(record, signal), log)
    this.records.set(record.id, record)
    this.#tokens.set(hash(record.token), record.id)
    log.info({ node: record.id, role: options.role, models: options.models }, 'node registered')
    return record
  }

  #call (signal: AbortSignal): Call {
    return { signal, headers: this.#options.headers ?? {}, dispatcher: this.#options.dispatcher, log: this.#options.log }
  }

  protected override linkViews (): readonly LinkView[] {
    return this.#links.views()
  }

  async #probe (record: NodeRecord, signal: AbortSignal): Promise<ProbeOutcome> {
    const call = this.#call(signal)
    try {
      if (!record.adapterKnown) record.adapter = resolveAdapter(await detectAdapter(record.forAdapter(), call), this.#extra)
      // The probe compares the registered role with the one that the node reports.
      const info = checkedInfo(await abortable(record.adapter.probe(record.forAdapter(record.registeredRole), call), signal))
      if (this.records.get(record.id) === record) this.#answered(record, info)
      return info.status === 'initialising' ? 'starting' : 'well'
    } catch (error) {
      if (this.records.get(record.id) === record && !this.closing.signal.aborted) this.#failed(record, error as Error)
      return isCertain(error) ? 'dead' : 'ill'
    }
  }

  #answered (record: NodeRecord, info: NodeInfo): void {
    const { log } = this.#options
    const { id, state, lives, info: known } = record
    const changed = record.answered(info)
    const twin = info.epoch === known?.epoch ? undefined : [...this.records.values()].find(other => other !== record && sameEngine(other, record))
    if (twin !== undefined) log.warn({ node: id, same_as: twin.id }, 'one engine is registered under two URLs: remove one of them')
    if (record.lives !== lives) log.info({ node: id, epoch: info.epoch }, 'node has restarted')
    if (record.state !== state) log.info({ node: id, from: state, to: record.state }, 'node state changed')
    if (changed) this.#sync(record)
    else this.#links.sync(record, this.records.values())
  }

  #failed (record: NodeRecord, err: Error): void {
    const { id, state } = record
    if (!record.failed(err)) return
    if (record.state !== state) this.#options.log.warn({ node: id, from: state, err }, 'node is unhealthy')
    this.#sync(record)
  }

  #sync (record: NodeRecord): void {
    this.changed()
    this.#links.sync(record, this.records.values())
  }
}

function hash (token: string): string {
  return createHash('sha256').update(token).digest('base64')
}
