import { EventEmitter, setMaxListeners } from 'node:events'
import { AdapterError, type Stage } from '../../adapters/adapter.ts'
import type { RegistryOptions, Ticket } from './api.ts'
import { idleTicket, type NodeRecord } from './node.ts'
import { buildSnapshot } from './snapshot.ts'
import type { LinkView, NodeSnapshot, RegistrySnapshot } from './types.ts'

/** The nodes as a request sees them: a snapshot to plan with, and nodes to take into use. */
export abstract class NodeTable extends EventEmitter<{ change: [RegistrySnapshot] }> {
  protected readonly records = new Map<string, NodeRecord>()
  protected readonly closing = new AbortController()
  readonly #stages: RegistryOptions['stages']
  #version = 0
  #snapshot: RegistrySnapshot | undefined
  #announced = false

  constructor (stages: RegistryOptions['stages']) {
    super()
    this.#stages = stages
    setMaxListeners(0, this, this.closing.signal)
  }

  protected abstract linkViews (): readonly LinkView[]

  get (id: string): NodeSnapshot | undefined {
    return this.snapshot().byId.get(id)
  }

  snapshot (): RegistrySnapshot {
    this.#snapshot ??= buildSnapshot(this.#version, this.records.values(), this.linkViews())
    return this.#snapshot
  }

  acquire (id: string, stage: Stage, tokens = 0, work = tokens): Ticket {
    const record = this.records.get(id)
    if (record === undefined) return idleTicket(id, stage)
    return record.load.take(id, stage, tokens, work, record.breakers.of(stage), record.uses, this.#stages)
  }

  reserve (id: string, tokens = 0, work = tokens): () => void {
    return this.records.get(id)?.load.reserve(tokens, work) ?? (() => {})
  }

  protected registered (id: string): NodeRecord {
    const record = this.records.get(id)
    if (record !== undefined) return record
    throw new AdapterError('UNAVAILABLE', `${id} is not registered`, { node: id })
  }

  /** Announces all changes of one turn of the event loop together. */
  protected changed (): void {
    this.#version++
    this.#snapshot = undefined
    if (this.#announced) return
    this.#announced = true
    queueMicrotask(() => {
      this.#announced = false
      if (!this.closing.signal.aborted) this.emit('change', this.snapshot())
    })
  }
}
