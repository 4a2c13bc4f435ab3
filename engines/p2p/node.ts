import { once } from 'node:events'
import type { Worker } from 'node:worker_threads'
import { bareWorker } from '../runtime/bare-worker.ts'
import { abortable } from '../service/waiting.ts'
import { checkCompatible, chooseAddress } from './endpoint.ts'
import { P2PError, type CallOptions, type LeaseName, type P2PEndpointInfo, type P2PNodeOptions, type P2PPeer, type PullOptions, type PullResult } from './types.ts'
import { makeIpcDir, sweepIpcDirs, type IpcDir } from './ipc-dir.ts'
import { allowedPeersOf, endpointOf, workerDataOf } from './node-setup.ts'
import { WorkerPulls } from './worker-pulls.ts'
import type { FromWorker, ToWorker } from './messages.ts'
import { WorkerCalls } from './worker-calls.ts'
import { WriteGate } from './incoming.ts'

export const DEFAULT_CONNECT_TIMEOUT_MS = 5000
export const DEFAULT_PULL_TIMEOUT_MS = 30_000
export const DEFAULT_CALL_TIMEOUT_MS = 5000
const CLOSE_TIMEOUT_MS = 3000

/**
 * This engine's end of every P2P link: the main thread's face of the transfer worker, which owns the sockets. All methods
 * reject with P2PError; see its codes.
 */
export class P2PNode {
  readonly endpoint: P2PEndpointInfo
  readonly #options: P2PNodeOptions
  readonly #worker: Worker
  readonly #calls: WorkerCalls
  readonly #pulls: WorkerPulls
  readonly #ipc: IpcDir | undefined
  readonly #allowedPeers: ReadonlySet<string>
  readonly #peers = new Map<string, P2PPeer>()
  readonly #flights = new Map<string, { epoch: number, peer: Promise<P2PPeer> }>()
  readonly #exited: Promise<void>
  #closing: Promise<void> | undefined

  /** Binds the sockets. Rejects if the address can't be bound. */
  static async open (options: P2PNodeOptions): Promise<P2PNode> {
    const ipc = options.ipc === false ? undefined : makeIpcDir()
    try {
      const workerData = await workerDataOf(options, ipc)
      if (ipc !== undefined) await sweepIpcDirs()
      const worker = bareWorker(new URL('./transfer-worker.js', import.meta.url), 'epd-transfer', workerData)
      return new P2PNode(options, worker, ipc, await listening(worker))
    } catch (err) {
      ipc?.remove()
      throw err
    }
  }

  private constructor (options: P2PNodeOptions, worker: Worker, ipc: IpcDir | undefined, tcp: string) {
    this.#options = options
    this.#worker = worker
    this.#ipc = ipc
    this.#allowedPeers = new Set(allowedPeersOf(options))
    this.#calls = new WorkerCalls((message) => this.#post(message))
    this.#pulls = new WorkerPulls(options.leases)
    this.endpoint = endpointOf(options, ipc, tcp)
    worker.on('message', (message: FromWorker) => this.#onMessage(message))
    worker.on('error', (err) => options.log?.warn({ err }, 'transfer worker failed'))
    // Not events.once: that rejects on an 'error' event, and a worker that crashes exits too.
    this.#exited = new Promise<void>((resolve) => worker.once('exit', () => resolve())).then(() => this.#onExit())
    process.once('exit', this.#removeIpc)
  }

  /**
   * Makes sure there is a warm link to that process: idempotent, single flight, and a new epoch replaces the old link.
   * Rejects with REFUSED (and the reason) when the two engines do not fit or a key is wrong, GONE or TIMEOUT when it can't
   * be reached.
   */
  async connect (remote: P2PEndpointInfo, options: CallOptions = {}): Promise<P2PPeer> {
    this.#checkOpen()
    checkCompatible(this.endpoint, remote, this.#allowedPeers)
    const peer = this.#peers.get(remote.engine)
    if (peer?.epoch === remote.epoch && peer.info.tcp === remote.tcp) return peer
    let flight = this.#flights.get(remote.engine)
    if (flight?.epoch !== remote.epoch) {
      this.#forget(remote.engine)
      flight = { epoch: remote.epoch, peer: this.#link(remote, options) }
      this.#flights.set(remote.engine, flight)
      const landed = (): void => { if (this.#flights.get(remote.engine) === flight) this.#flights.delete(remote.engine) }
      flight.peer.then(landed, landed)
    }
    // A waiter's signal must not fail the others of the same flight.
    return await abortable(flight.peer, options.signal).catch((err: unknown) => {
      if (options.signal?.aborted === true && err === options.signal.reason) throw new P2PError('ABORTED', 'connecting was aborted', { cause: err })
      throw err
    })
  }

  /** Closes the link to an engine; its calls under way reject with GONE. False when there was none. */
  async drop (engineId: string): Promise<boolean> {
    const known = this.#peers.has(engineId) || this.#flights.has(engineId)
    this.#forget(engineId)
    if (known) this.#post({ op: 'drop', engineId, code: 'GONE', reason: 'the link was dropped' })
    return known
  }

  peer (engineId: string): P2PPeer | undefined {
    return this.#peers.get(engineId)
  }

  peers (): P2PPeer[] {
    return [...this.#peers.values()]
  }

  /**
   * Copies blocks of another engine into blocks of the local pool of the same name, every chunk verified. When the promise
   * has settled, in whatever way, nothing is written into `localBlocks` any more: the caller may use or free them.
   */
  async pull (options: PullOptions): Promise<PullResult> {
    const { engineId, epoch, lease, pool, traceparent, signal } = options
    const peer = this.#linked(engineId)
    const bytes = this.#checkPull(options)
    const gate = new WriteGate()
    const startedAt = performance.now()
    await this.#calls.run((call) => ({
      op: 'pull',
      call,
      pull: {
        engineId,
        epoch,
        lease,
        pool,
        remoteBlocks: [...options.remoteBlocks],
        localBlocks: [...options.localBlocks],
        bytes,
        gate: gate.memory,
        traceparent
      }
    }), { signal, timeoutMs: options.timeoutMs ?? DEFAULT_PULL_TIMEOUT_MS, what: `pull from ${engineId}`, gate })
    return { bytes, transport: peer.transport, ms: performance.now() - startedAt }
  }

  /** Acknowledges to the producer that the blocks have arrived. `ended` is false when the lease had ended before: no error. */
  ack (lease: LeaseName, options: CallOptions = {}): Promise<{ ended: boolean }> {
    return this.#end('ack', lease, options)
  }

  /** Ends the lease without a pull. */
  release (lease: LeaseName, options: CallOptions = {}): Promise<{ ended: boolean }> {
    return this.#end('release', lease, options)
  }

  /** Ends every call and link, the worker and the socket file. Idempotent. */
  close (): Promise<void> {
    this.#closing ??= this.#close()
    return this.#closing
  }

  async #close (): Promise<void> {
    this.#calls.giveUpAll(new P2PError('CLOSED', 'this engine is closing'))
    this.#post({ op: 'close' })
    const timer = setTimeout(() => { this.#worker.terminate() }, CLOSE_TIMEOUT_MS)
    await this.#exited
    clearTimeout(timer)
  }

  async #link (remote: P2PEndpointInfo, options: CallOptions): Promise<P2PPeer> {
    const { engine: engineId, epoch } = remote
    const { transport, address } = chooseAddress(this.endpoint, remote)
    const target = { engineId, epoch, address, serverKey: remote.curve }
    const limits = { timeoutMs: options.timeoutMs ?? DEFAULT_CONNECT_TIMEOUT_MS, what: `connecting to ${engineId}` }
    try {
      await this.#calls.run((call) => ({ op: 'connect', call, target, traceparent: options.traceparent }), limits)
    } catch (err) {
      // Unless a newer flight owns the link by now.
      if (this.#flights.get(engineId)?.epoch === epoch) this.#post({ op: 'drop', engineId, code: 'GONE', reason: 'the link failed' })
      throw err
    }
    const peer: P2PPeer = { engineId, epoch, transport, encrypted: remote.curve !== null, info: remote }
    this.#peers.set(engineId, peer)
    return peer
  }

  async #end (how: 'ack' | 'release', lease: LeaseName, options: CallOptions): Promise<{ ended: boolean }> {
    this.#linked(lease.engineId)
    const { signal, timeoutMs = DEFAULT_CALL_TIMEOUT_MS, traceparent } = options
    const { engineId, epoch, lease: id } = lease
    return await this.#calls.run(
      (call) => ({ op: 'end', call, how, lease: { engineId, epoch, lease: id }, traceparent }),
      { signal, timeoutMs, what: `${how} to ${engineId}` }
    ) as { ended: boolean }
  }

  #linked (engineId: string): P2PPeer {
    this.#checkOpen()
    const peer = this.#peers.get(engineId)
    if (peer === undefined) throw new P2PError('NOT_LINKED', `no link to ${engineId}`)
    return peer
  }

  /** Returns the bytes to pull; throws RangeError for what only a bug of the caller explains. */
  #checkPull ({ pool: name, localBlocks, remoteBlocks, bytes }: PullOptions): number {
    const pool = this.#options.pools[name]?.pool
    if (pool === undefined) throw new RangeError(`this engine has no ${name} pool`)
    if (localBlocks.length !== remoteBlocks.length) throw new RangeError('a pull needs as many local blocks as remote ones')
    if (!localBlocks.every((id) => pool.isAllocated(id))) throw new RangeError('a pull goes into allocated blocks only')
    const all = localBlocks.length * pool.blockBytes
    const wanted = bytes ?? all
    if (!(wanted >= 1 && wanted <= all)) throw new RangeError(`a pull of ${localBlocks.length} blocks can't bring ${wanted} bytes`)
    return wanted
  }

  #forget (engineId: string): void {
    this.#peers.delete(engineId)
    this.#flights.delete(engineId)
  }

  #checkOpen (): void {
    if (this.#closing !== undefined) throw new P2PError('CLOSED', 'this engine\'s P2P node is closed')
  }

  #post (message: ToWorker): void {
    this.#worker.postMessage(message)
  }

  #onMessage (message: FromWorker): void {
    switch (message.op) {
      case 'done': return this.#calls.done(message.call, message.value)
      case 'failed': return this.#calls.failed(message.call, message.code, message.message)
      case 'ask-pull': return this.#post({ op: 'verdict', ask: message.ask, verdict: this.#pulls.beginPull(message) })
      case 'ask-end': return this.#post({ op: 'verdict', ask: message.ask, verdict: this.#pulls.endLease(message) })
      case 'pull-over': {
        this.#pulls.endPull(message.ask)
        if (message.served !== undefined) this.#options.onServed?.(message.served)
        return
      }
      case 'log': return this.#options.log?.[message.level](message.data, message.message)
      case 'listening':
      case 'failed-to-start': return
      default: return message satisfies never
    }
  }

  #onExit (): void {
    this.#closing ??= Promise.resolve()
    this.#calls.rejectAll(new P2PError('CLOSED', 'the transfer worker has ended'))
    this.#pulls.close()
    this.#peers.clear()
    process.removeListener('exit', this.#removeIpc)
    this.#removeIpc()
  }

  readonly #removeIpc = (): void => this.#ipc?.remove()
}

/** The address the worker bound; ends the worker when it could not. */
async function listening (worker: Worker): Promise<string> {
  try {
    const [first] = await once(worker, 'message') as [FromWorker]
    if (first.op === 'listening') return first.tcp
    throw new Error(first.op === 'failed-to-start' ? first.message : first.op)
  } catch (cause) {
    await worker.terminate()
    throw new P2PError('CLOSED', `the transfer socket can't be opened: ${(cause as Error).message}`, { cause })
  }
}
