import { Dealer, type Context } from 'zeromq'
import type { PoolName } from '../cache/index.ts'
import type { BlockMemory } from './block-copy.ts'
import { deferred, Semaphore, type Deferred } from '../service/waiting.ts'
import { P2PError, type P2PErrorCode, type LeaseName } from './types.ts'
import { Incoming } from './incoming.ts'
import type { LinkTarget, PullCall, WorkerData } from './messages.ts'
import { Refusals } from './refusals.ts'
import { collectReceived } from './minor-gc.ts'
import { commonOptions, Writer } from './sockets.ts'
import { decodeReply, encodeHeader, MAX_CHUNK_BYTES, WIRE_VERSION, type Chunk, type Reply, type Request, type Welcome } from './wire.ts'

/** Attempts to reach an address that a new link may take, about half a second at 100 ms each. */
const MAX_CONNECT_ATTEMPTS = 5
const FRAME_SLACK_BYTES = 1024
/** Pulls over one link at a time. */
const MAX_PULLS = 32
/** A server that closes during the handshake does not say why: after so many times it is the keys. */
const MAX_BROKEN_HANDSHAKES = 3

interface Waiting {
  readonly request: Request['type']
  /** Set for a pull: where its chunks go. */
  incoming: Incoming | undefined
  traceparent: string | undefined
  answer: Deferred<unknown>
}

const collect = collectReceived()

/** A request without what every request has. */
type Body<R = Request> = R extends unknown ? Omit<R, 'v' | 'id' | 'traceparent'> : never

/** A call under way; `cancel` rejects it with ABORTED and stops the peer. */
export interface Started {
  result: Promise<unknown>
  cancel: () => void
}

/** Our end of a link to one process of another engine: a Dealer socket, and the calls that wait for its answers. */
export class Link {
  readonly target: LinkTarget
  readonly #socket: Dealer
  readonly #writer: Writer
  readonly #data: WorkerData
  readonly #memory: Partial<Record<PoolName, BlockMemory>>
  readonly #waiting = new Map<string, Waiting>()
  /** A burst of pulls waits here instead of at the producer, which would refuse the last ones. */
  readonly #pulls = new Semaphore(MAX_PULLS)
  readonly #fatal: (err: unknown) => void
  readonly #refusals: Refusals
  #up = deferred<void>()
  #isUp = false
  #everUp = false
  #attempts = 0
  #broken = 0

  /** @param fatal called when the socket is of no use any more, for a reason that only a bug or the system explains */
  constructor (context: Context, data: WorkerData, memory: Partial<Record<PoolName, BlockMemory>>, target: LinkTarget, fatal: (err: unknown) => void) {
    this.target = target
    this.#fatal = fatal
    this.#refusals = new Refusals(data.refusals)
    this.#data = data
    this.#memory = memory
    const { curve } = data
    this.#socket = new Dealer({
      context,
      ...commonOptions(data),
      ipv6: target.address.startsWith('tcp://['),
      sendTimeout: 1000,
      sendHighWaterMark: 1024,
      receiveHighWaterMark: 64,
      // Of what is on the wire: CURVE adds some bytes to a frame.
      maxMessageSize: MAX_CHUNK_BYTES + FRAME_SLACK_BYTES,
      reconnectInterval: 100,
      reconnectMaxInterval: 1000,
      ...(curve === null ? {} : { curvePublicKey: curve.publicKey, curveSecretKey: curve.secretKey, curveServerKey: target.serverKey })
    })
    this.#writer = new Writer(this.#socket)
    this.#observe()
  }

  /** Connects and exchanges a first message, so that the first pull finds a warm link. */
  open (traceparent: string | undefined): Started {
    this.#socket.connect(this.target.address)
    this.#receive().catch((err: unknown) => { this.#fatal(err) })
    const { engineId: engine, epoch } = this.target
    return this.#start({ type: 'hello', from: this.#data.engineId, engine, epoch }, traceparent)
  }

  pull (pull: PullCall): Started {
    const memory = this.#memory[pull.pool]
    if (memory === undefined) throw new P2PError('REFUSED', `this engine has no ${pull.pool} pool`)
    const { window, chunkBytes: chunk } = this.#data
    const { pool, remoteBlocks: blocks, bytes } = pull
    return this.#start({ type: 'pull', ...this.#naming(pull), pool, blocks, bytes, chunk, window }, pull.traceparent, new Incoming(pull, memory, window))
  }

  end (how: 'ack' | 'release', lease: LeaseName, traceparent: string | undefined): Started {
    return this.#start({ type: how, ...this.#naming(lease) }, traceparent)
  }

  /** Sent once, and not at all while the connection is down: it only saves time. */
  offer (lease: string, traceparent: string | undefined): void {
    if (!this.#isUp) return
    const { engineId, epoch } = this.target
    this.#send({ v: WIRE_VERSION, type: 'offer', id: crypto.randomUUID(), ...this.#naming({ engineId, epoch, lease }), traceparent }).catch(() => {})
  }

  ask (lease: LeaseName): Started {
    return this.#start({ type: 'ask', ...this.#naming(lease) }, undefined)
  }

  /** Rejects every call under way. */
  fail (code: P2PErrorCode, reason: string): void {
    for (const id of [...this.#waiting.keys()]) this.#reject(id, new P2PError(code, `${this.target.engineId}: ${reason}`))
  }

  close (code: P2PErrorCode, reason: string): void {
    if (this.#socket.closed) return
    this.fail(code, reason)
    this.#up.reject(new P2PError(code, reason))
    this.#socket.close()
  }

  #naming (lease: LeaseName): { from: string, engine: string, epoch: number, lease: string, link: number } {
    return { from: this.#data.engineId, engine: lease.engineId, epoch: lease.epoch, lease: lease.lease, link: this.target.epoch }
  }

  #start (body: Body, traceparent: string | undefined, incoming?: Incoming): Started {
    // Never used again, by any link of any process: a late answer to an old call finds no waiter.
    const id = crypto.randomUUID()
    const answer = deferred<unknown>()
    this.#waiting.set(id, { request: body.type, incoming, traceparent, answer })
    const send = async (): Promise<void> => {
      if (incoming !== undefined) {
        const leave = await this.#pulls.enter()
        answer.promise.catch(() => {}).finally(leave)
      }
      if (!this.#waiting.has(id)) return
      await this.#whenUp()
      if (this.#waiting.has(id)) await this.#send({ ...body, v: WIRE_VERSION, id, traceparent })
    }
    send()
      .catch((cause: unknown) => {
        const gone = new P2PError('GONE', `${this.target.engineId} can't be reached`, { cause })
        this.#reject(id, cause instanceof P2PError ? cause : gone)
      })
    const cancel = (): void => {
      if (incoming !== undefined && this.#waiting.has(id)) this.#sendCancel(id, traceparent)
      this.#reject(id, new P2PError('ABORTED', 'cancelled'))
    }
    return { result: answer.promise, cancel }
  }

  /** ZeroMQ reconnects when the peer comes back. A call waits for that, at most one heartbeat interval. */
  #whenUp (): Promise<void> {
    if (this.#isUp) return Promise.resolve()
    if (!this.#everUp) return this.#up.promise
    const timer = setTimeout(() => this.#up.reject(new P2PError('GONE', `${this.target.engineId}: the connection is lost`)), this.#data.heartbeatMs)
    return this.#up.promise.finally(() => clearTimeout(timer))
  }

  #send (request: Request): Promise<void> {
    return this.#writer.send([encodeHeader(request)])
  }

  #sendCancel (id: string, traceparent: string | undefined): void {
    this.#send({ v: WIRE_VERSION, type: 'cancel', id, traceparent }).catch(() => { /* the server notices a peer that takes nothing */ })
  }

  async #receive (): Promise<void> {
    for await (const [frame, payload] of this.#socket) {
      // One at a time: whatever the peer sends, the next message finds a reader.
      try {
        const reply = frame === undefined ? undefined : decodeReply(frame)
        if (reply === undefined) this.#refusals.add('malformed')
        else this.#handle(reply, payload)
      } catch (err) {
        this.fail('GONE', `a message could not be handled: ${String(err)}`)
      }
    }
    if (!this.#socket.closed) throw new Error(`the link to ${this.target.engineId} gives no more messages`)
  }

  #handle (reply: Reply, payload: Buffer | undefined): void {
    const waiting = this.#waiting.get(reply.id)
    switch (reply.type) {
      case 'chunk': return this.#take(reply, payload ?? Buffer.alloc(0), waiting)
      case 'error': return this.#reject(reply.id, new P2PError(reply.code, `${this.target.engineId}: ${reply.message}`))
      case 'alive': return
      case 'welcome': return waiting?.request === 'hello' ? this.#welcomed(reply) : this.#mistaken(reply, waiting)
      case 'ended': return waiting?.request === 'ack' || waiting?.request === 'release' ? this.#resolve(reply.id, { ended: reply.ended }) : this.#mistaken(reply, waiting)
      case 'offered': return waiting?.request === 'ask' ? this.#resolve(reply.id, reply.offer) : this.#mistaken(reply, waiting)
      default: return reply satisfies never
    }
  }

  #welcomed ({ id, engine, epoch }: Welcome): void {
    const { engineId, epoch: wanted } = this.target
    if (engine === engineId && epoch === wanted) this.#resolve(id, undefined)
    else this.#reject(id, new P2PError('STALE', `${engineId}: another process listens here now`))
  }

  /** A pull that such an answer ended would pass off what its blocks held before, another request's features, as its own. */
  #mistaken ({ id, type }: Reply, waiting: Waiting | undefined): void {
    // One that comes late, after its request was given up.
    if (waiting === undefined) return
    this.#refusals.add('malformed')
    this.#reject(id, new P2PError('GONE', `${this.target.engineId} answered "${waiting.request}" with "${type}"`))
  }

  #take (chunk: Chunk, payload: Buffer, waiting: Waiting | undefined): void {
    // A chunk without a waiter: its pull was given up, or began before a reconnect. Its server should stop.
    if (waiting === undefined) return this.#sendCancel(chunk.id, chunk.traceparent)
    if (waiting.incoming === undefined) return this.#mistaken(chunk, waiting)
    const { incoming, traceparent } = waiting
    collect(payload.length)
    try {
      if (!incoming.accept(chunk, payload)) return
    } catch (err) {
      this.#sendCancel(chunk.id, traceparent)
      return this.#reject(chunk.id, err as P2PError)
    }
    const { credit: upto, done, pull } = incoming
    this.#send({ v: WIRE_VERSION, type: 'credit', id: chunk.id, upto, traceparent }).catch(() => { /* then the link is down, which ends the pull */ })
    if (done) this.#resolve(chunk.id, { bytes: pull.bytes })
  }

  #resolve (id: string, value: unknown): void {
    const waiting = this.#waiting.get(id)
    this.#waiting.delete(id)
    waiting?.answer.resolve(value)
  }

  #reject (id: string, error: P2PError): void {
    const waiting = this.#waiting.get(id)
    this.#waiting.delete(id)
    waiting?.answer.reject(error)
  }

  #observe (): void {
    const { events } = this.#socket
    events.on('handshake', () => {
      this.#isUp = this.#everUp = true
      this.#up.resolve()
    })
    events.on('disconnect', () => {
      if (!this.#isUp) return
      this.#isUp = false
      this.#up = deferred<void>()
      this.fail('GONE', 'the connection was lost')
    })
    events.on('connect', () => { this.#attempts = 0 })
    events.on('connect:retry', () => {
      if (!this.#everUp && ++this.#attempts > MAX_CONNECT_ATTEMPTS) this.#giveUp('GONE', `no process listens on ${this.target.address}`)
    })
    events.on('handshake:error:auth', () => this.#giveUp('REFUSED', 'does not accept this engine\'s CURVE key'))
    events.on('handshake:error:protocol', () => this.#giveUp('REFUSED', 'speaks another security mechanism, or is no P2P endpoint'))
    events.on('handshake:error:other', () => {
      if (++this.#broken >= MAX_BROKEN_HANDSHAKES) this.#giveUp('REFUSED', 'closed the connection in the handshake: its CURVE key, or its security mechanism, is another one')
    })
  }

  #giveUp (code: P2PErrorCode, reason: string): void {
    this.fail(code, reason)
    this.#up.reject(new P2PError(code, reason))
    if (this.#everUp) this.#up = deferred<void>()
  }
}
