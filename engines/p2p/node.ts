import { bareWorker } from '../runtime/bare-worker.ts'
import { Thread } from '../runtime/thread.ts'
import { abortable } from '../service/waiting.ts'
import { checkCompatible, chooseAddress } from './endpoint.ts'
import { P2PError, type CallOptions, type LeaseName, type P2PEndpointInfo, type P2PNodeOptions, type P2PPeer, type PullOptions, type PullResult } from './types.ts'
import { makeIpcDir, sweepIpcDirs, type IpcDir } from './ipc-dir.ts'
import { allowedPeersOf, endpointOf, workerDataOf } from './node-setup.ts'
import { WorkerPulls } from './worker-pulls.ts'
import type { FromWorker, ToWorker } from './messages.ts'
import { Refusals, type Refusal } from './refusals.ts'
import { WorkerCalls } from './worker-calls.ts'
import { WriteGate } from './write-gate.ts'

export const DEFAULT_CONNECT_TIMEOUT_MS = 5000
export const DEFAULT_PULL_TIMEOUT_MS = 30_000
export const DEFAULT_CALL_TIMEOUT_MS = 5000
const CLOSE_TIMEOUT_MS = 3000

/** A link that is being made. */
interface Flight {
  readonly epoch: number
  readonly peer: Promise<P2PPeer>
}

/**
 * This engine's end of every P2P link: the main thread's face of the transfer worker, which owns the sockets. All methods
 * reject with P2PError; see its codes.
 */
export class P2PNode {
  endpoint!: P2PEndpointInfo
  readonly #options: P2PNodeOptions
  #thread!: Thread<FromWorker>
  readonly #refusals = new Refusals()
  readonly #calls: WorkerCalls
  readonly #pulls: WorkerPulls
  readonly #ipc: IpcDir | undefined
  readonly #allowedPeers: ReadonlySet<string>
  readonly #peers = new Map<string, P2PPeer>()
  readonly #flights = new Map<string, Flight>()
  /** Linked when the transfer worker ended. */
  readonly #lost = new Set<P2PEndpointInfo>()
  /** Transfer workers that have ended. */
  #workers = 0
  #closing: Promise<void> | undefined

  /** Binds the sockets. Rejects if the address can't be bound. */
  static async open (options: P2PNodeOptions): Promise<P2PNode> {
    const ipc = options.ipc === false ? undefined : makeIpcDir()
    const node = new P2PNode(options, ipc)
    try {
      await node.#start()
    } catch (cause) {
      node.#removeIpc()
      throw cause instanceof RangeError ? cause : new P2PError('CLOSED', `the transfer socket can't be opened: ${(cause as Error).message}`, { cause })
    }
    process.once('exit', node.#removeIpc)
    return node
  }

  private constructor (options: P2PNodeOptions, ipc: IpcDir | undefined) {
    this.#options = options
    this.#ipc = ipc
    this.#allowedPeers = new Set(allowedPeersOf(options))
    this.#calls = new WorkerCalls((message) => this.#post(message))
    this.#pulls = new WorkerPulls(options.leases, this.#refusals, (engineId) => this.#peers.has(engineId))
  }

  async #start (): Promise<void> {
    const workerData = await workerDataOf(this.#options, this.#ipc, this.#refusals.memory)
    if (this.#ipc !== undefined) await sweepIpcDirs()
    this.#thread = await Thread.open<FromWorker>({
      name: 'transfer worker',
      make: () => bareWorker(new URL('./transfer-worker.js', import.meta.url), 'epd-transfer', workerData),
      started: (message) => {
        if (message.op === 'failed-to-start') return new Error(message.message)
        // A peer that is refused is in the log, perhaps before the last socket is bound.
        if (message.op !== 'listening') return undefined
        // The port that the system chose is the worker's for ever: others know it.
        workerData.tcp = message.tcp
        return 'works'
      },
      onMessage: (message) => this.#onMessage(message),
      onLost: () => this.#onLost(),
      onBack: () => this.#relink(),
      log: this.#options.log
    })
    this.endpoint = endpointOf(this.#options, this.#ipc, workerData.tcp)
  }

  /** Why no blocks can be transferred just now: the transfer worker has ended, and is being started anew. */
  get problem (): string | undefined {
    return this.#thread.problem
  }

  /** Messages of peers that were refused, by reason. */
  get refused (): Readonly<Record<Refusal, number>> {
    return this.#refusals.counts
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
      flight = this.#fly(remote, options)
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
    const { gate = new WriteGate() } = options
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

  /** Lets a linked engine know that blocks are being filled for it. Best effort; without a link to it, nothing. */
  offer (engineId: string, lease: string, traceparent?: string): void {
    if (this.#peers.has(engineId) && this.#closing === undefined) this.#post({ op: 'offer', engineId, lease, traceparent })
  }

  /** What an engine offers under a lease, asked over the link to it. Rejects with GONE when there is no such offer. */
  async ask ({ engineId, lease }: Pick<LeaseName, 'engineId' | 'lease'>, { signal, timeoutMs = DEFAULT_CALL_TIMEOUT_MS }: CallOptions = {}): Promise<unknown> {
    const { epoch } = this.#linked(engineId)
    return await this.#calls.run((call) => ({ op: 'ask', call, lease: { engineId, epoch, lease } }), { signal, timeoutMs, what: `asking ${engineId} about an offer` })
  }

  /** Ends every call and link, the worker and the socket file. Idempotent. */
  close (): Promise<void> {
    this.#closing ??= this.#close()
    return this.#closing
  }

  async #close (): Promise<void> {
    this.#calls.giveUpAll(new P2PError('CLOSED', 'this engine is closing'))
    await this.#thread.close({ op: 'close' } satisfies ToWorker, CLOSE_TIMEOUT_MS)
    this.#calls.rejectAll(new P2PError('CLOSED', 'the transfer worker has ended'))
    this.#pulls.close()
    this.#peers.clear()
    process.removeListener('exit', this.#removeIpc)
    this.#removeIpc()
  }

  #fly (remote: P2PEndpointInfo, options: CallOptions): Flight {
    const isCurrent = (): boolean => this.#flights.get(remote.engine) === flight
    const flight: Flight = { epoch: remote.epoch, peer: this.#link(remote, options, isCurrent) }
    this.#flights.set(remote.engine, flight)
    const landed = (): void => { if (isCurrent()) this.#flights.delete(remote.engine) }
    flight.peer.then(landed, landed)
    return flight
  }

  /** @param isCurrent false when the link was dropped or replaced meanwhile: whatever the worker says of it then is out of date */
  async #link (remote: P2PEndpointInfo, options: CallOptions, isCurrent: () => boolean): Promise<P2PPeer> {
    const { engine: engineId, epoch } = remote
    const { transport, address } = chooseAddress(this.endpoint, remote)
    const target = { engineId, epoch, address, serverKey: remote.curve }
    const limits = { timeoutMs: options.timeoutMs ?? DEFAULT_CONNECT_TIMEOUT_MS, what: `connecting to ${engineId}` }
    try {
      await this.#calls.run((call) => ({ op: 'connect', call, target, traceparent: options.traceparent }), limits)
    } catch (err) {
      if (isCurrent()) this.#post({ op: 'drop', engineId, code: 'GONE', reason: 'the link failed' })
      throw err
    }
    if (!isCurrent()) throw new P2PError('GONE', `the link to ${engineId} was dropped`)
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
    if (this.#thread.problem !== undefined) throw new P2PError('GONE', this.#thread.problem)
  }

  #post (message: ToWorker): void {
    this.#thread.post(message)
  }

  #onMessage (message: FromWorker): void {
    switch (message.op) {
      case 'done': return this.#calls.done(message.call, message.value)
      case 'failed': return this.#calls.failed(message.call, message.code, message.message)
      case 'ask-pull': return this.#beginPull(message)
      case 'ask-end': return this.#post({ op: 'verdict', ask: message.ask, verdict: this.#pulls.endLease(message) })
      case 'ask-offer': {
        const offer = this.#options.offers?.get(message.lease)
        return this.#post({ op: 'verdict', ask: message.ask, verdict: offer === undefined ? { ok: false, code: 'GONE', message: 'no such offer' } : { ok: true, offer } })
      }
      case 'offered': {
        this.#options.onOffer?.(message.offer)
        return this.#post({ op: 'offer-taken' })
      }
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

  /** A pull of blocks that are still being filled waits until they are, or until their lease has ended because they will not be. */
  #beginPull (message: Extract<FromWorker, { op: 'ask-pull' }>): void {
    const begin = (): void => { this.#post({ op: 'verdict', ask: message.ask, verdict: this.#pulls.beginPull(message) }) }
    const { filled } = this.#options.leases.get(message.lease) ?? {}
    if (filled === undefined) return begin()
    const worker = this.#workers
    // The pull has ended with its worker; the next one counts its questions from the start.
    filled.then(() => { if (worker === this.#workers && this.#closing === undefined) begin() })
  }

  /** The worker has ended by itself: its calls have no answer, its pulls read nothing any more, its links are gone. */
  #onLost (): void {
    this.#workers++
    this.#calls.rejectAll(new P2PError('GONE', 'the transfer worker has ended'))
    this.#pulls.close()
    for (const { info } of this.#peers.values()) this.#lost.add(info)
    this.#peers.clear()
    this.#flights.clear()
  }

  /** Peers find the new worker where the old one was; the links from here are made again. */
  #relink (): void {
    for (const info of this.#lost) {
      this.connect(info).catch((err: unknown) => { this.#options.log?.warn({ err, peer: info.engine }, 'a link could not be made again') })
    }
    this.#lost.clear()
  }

  readonly #removeIpc = (): void => this.#ipc?.remove()
}
