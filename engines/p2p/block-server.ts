import { setImmediate as nextTurn } from 'node:timers/promises'
import { Router, type Context } from 'zeromq'
import type { PoolName } from '../cache/index.ts'
import type { BlockMemory } from './block-copy.ts'
import type { OfferName, P2PErrorCode, ServedPull } from './types.ts'
import type { FromWorker, Verdict, WorkerData } from './messages.ts'
import { Refusals } from './refusals.ts'
import { Replies, Serving } from './serving.ts'
import { commonOptions, Writer } from './sockets.ts'
import { decodeRequest, encodeHeader, maxRequestBytes, WIRE_VERSION, type AskOffer, type EndLease, type Hello, type Offer, type Pull, type Reply, type Request } from './wire.ts'
import { ZAP_DOMAIN } from './zap.ts'

/** Chunks on their way to one peer over all its pulls: what a peer that takes nothing can make us hold. */
const MAX_PEER_CHUNKS = 24
/** Messages zeromq keeps for one peer; room for the chunks and for small replies. */
const SEND_HIGH_WATER_MARK = 64
const MAX_PULLS_PER_PEER = 256
/** Over all peers: one that calls itself many is still one. */
const MAX_PULLS = 4096
const RETRY_FULL_MS = 5

type Ask<M = Extract<FromWorker, { op: 'ask-pull' | 'ask-end' | 'ask-offer' }>> = M extends unknown ? Omit<M, 'ask'> : never

export interface ServerHooks {
  /** Asks the main thread, which has the lease table. */
  ask: (question: Ask, ask: number) => Promise<Verdict>
  /** False when the main thread has too many offers already. */
  offered: (offer: OfferName) => boolean
  /** Reports that a pull it agreed to is over. */
  over: (ask: number, served: ServedPull | undefined) => void
  nextAsk: () => number
  /** The socket is of no use any more, for a reason that only a bug or the system explains: the thread is to end. */
  fatal: (err: unknown) => void
  log: (level: 'debug' | 'warn', data: object, message: string) => void
}

/**
 * Serves pulls, ACKs and releases on one Router socket. Chunks go out in turn, one of each pull that has credit, so neither
 * a large pull nor a slow peer delays another; sending never blocks, because what does not fit is never sent.
 */
export class BlockServer {
  readonly #socket: Router
  readonly #writer: Writer
  readonly #replies: Replies
  readonly #data: WorkerData
  readonly #memory: Partial<Record<PoolName, BlockMemory>>
  readonly #hooks: ServerHooks
  readonly #refusals: Refusals
  /** By peer and transfer id; in the order in which they are served next. */
  readonly #servings = new Map<string, Serving>()
  readonly #watch: NodeJS.Timeout
  /** Peers whose pipe had no room just now. */
  readonly #full = new Set<string>()
  #pumping = false

  constructor (context: Context, data: WorkerData, memory: Partial<Record<PoolName, BlockMemory>>, hooks: ServerHooks) {
    this.#data = data
    this.#memory = memory
    this.#hooks = hooks
    this.#refusals = new Refusals(data.refusals)
    this.#socket = new Router({
      context,
      ...commonOptions(data),
      mandatory: true,
      // A full pipe to one peer must never hold up the others: such a send fails at once, and its pull with it.
      sendTimeout: 0,
      sendHighWaterMark: SEND_HIGH_WATER_MARK,
      receiveHighWaterMark: 256,
      maxMessageSize: maxRequestBytes(Math.max(...Object.values(memory).map(({ numBlocks }) => numBlocks))),
      ...(data.curve === null ? {} : { curveServer: true, curveSecretKey: data.curve.secretKey, zapDomain: ZAP_DOMAIN })
    })
    this.#writer = new Writer(this.#socket)
    this.#replies = new Replies(this.#writer, data.stallTimeoutMs)
    this.#watch = setInterval(() => this.#checkPeers(), data.heartbeatMs)
  }

  /** Binds, and returns the tcp address with its real port. */
  async listen (): Promise<string> {
    await this.#socket.bind(this.#data.tcp)
    const tcp = this.#socket.lastEndpoint as string
    if (this.#data.ipc !== null) await this.#socket.bind(this.#data.ipc)
    this.#socket.events.on('disconnect', () => this.#checkPeers())
    this.#receive().catch((err: unknown) => { this.#hooks.fatal(err) })
    return tcp
  }

  close (): void {
    clearInterval(this.#watch)
    this.#socket.close()
    this.#replies.close()
    for (const serving of [...this.#servings.values()]) this.#drop(serving, 'cancelled')
  }

  async #receive (): Promise<void> {
    for await (const [peer, header] of this.#socket) {
      // One at a time: whatever a peer sends, the next message finds a server.
      try {
        const request = header === undefined ? undefined : decodeRequest(header)
        if (peer === undefined || request === undefined) this.#refusals.add('malformed')
        else this.#handle(peer, request)
      } catch (err) {
        this.#onBug(err)
      }
    }
    if (!this.#socket.closed) throw new Error('the transfer socket gives no more messages')
  }

  #handle (peer: Buffer, request: Request): void {
    switch (request.type) {
      case 'hello': return this.#welcome(peer, request)
      case 'pull': {
        this.#serve(peer, request).catch(this.#onBug)
        return
      }
      case 'credit': {
        const serving = this.#servings.get(servingKey(peer, request.id))
        serving?.credit(request.upto)
        if (serving !== undefined) this.#forgetTaken(serving)
        return this.#pump()
      }
      case 'cancel': {
        const serving = this.#servings.get(servingKey(peer, request.id))
        if (serving !== undefined) this.#drop(serving, 'cancelled')
        return
      }
      case 'ack':
      case 'release': {
        this.#end(peer, request).catch(this.#onBug)
        return
      }
      case 'offer': {
        const { from, lease, traceparent } = request
        if (!this.#misnamed(peer, request) && !this.#hooks.offered({ engineId: from, lease, traceparent })) this.#refusals.add('flood')
        return
      }
      case 'ask': {
        this.#tell(peer, request).catch(this.#onBug)
        return
      }
      default: return request satisfies never
    }
  }

  #welcome (peer: Buffer, hello: Hello): void {
    const { engineId, epoch } = this.#data
    if (hello.engine !== engineId || hello.epoch !== epoch) this.#refuse(peer, hello, 'STALE', 'another process listens here now')
    else this.#replies.send(peer, { v: WIRE_VERSION, type: 'welcome', id: hello.id, engine: engineId, epoch, traceparent: hello.traceparent })
  }

  /** Checks who is meant before the lease table is asked; true when the request was refused. */
  #misnamed (peer: Buffer, request: Pull | EndLease | Offer | AskOffer): boolean {
    const { engineId, epoch } = this.#data
    if (request.engine === engineId && request.epoch === epoch && request.link === epoch) return false
    this.#refusals.add('stale')
    if (request.engine !== engineId || request.epoch !== epoch) this.#refuse(peer, request, 'STALE', 'the lease is of another process of this engine')
    else this.#refuse(peer, request, 'NOT_LINKED', 'the engine restarted since the link was made')
    return true
  }

  async #serve (peer: Buffer, request: Pull): Promise<void> {
    const key = servingKey(peer, request.id)
    if (this.#servings.has(key)) return this.#refusals.add('replay')
    if (this.#misnamed(peer, request)) return
    const memory = this.#memory[request.pool]
    if (memory === undefined || request.blocks.length > memory.numBlocks || request.bytes < 1 || request.bytes > request.blocks.length * memory.blockBytes) {
      this.#refusals.add('blocks')
      return this.#refuse(peer, request, 'REFUSED', `no such bytes in a ${request.pool} pool`)
    }
    if (this.#servings.size >= MAX_PULLS || this.#ofPeer(peer.toString('hex')).length >= MAX_PULLS_PER_PEER) {
      this.#refusals.add('flood')
      return this.#refuse(peer, request, 'REFUSED', 'too many pulls at once')
    }
    const { from, id, engine, epoch, lease, pool, blocks } = request
    const serving = new Serving(peer, request, this.#hooks.nextAsk(), memory)
    this.#servings.set(key, serving)
    const verdict = await this.#hooks.ask({ op: 'ask-pull', from, id, engine, epoch, lease, pool, blocks }, serving.ask)
    if (!verdict.ok) {
      this.#forget(serving)
      return this.#refuse(peer, request, verdict.code, verdict.message)
    }
    serving.authorised = true
    serving.progressAt = performance.now()
    if (serving.settled) this.#hooks.over(serving.ask, serving.report('cancelled'))
    else this.#pump()
  }

  async #end (peer: Buffer, request: EndLease): Promise<void> {
    if (this.#misnamed(peer, request)) return
    const { from, engine, epoch, lease, type: how } = request
    const verdict = await this.#hooks.ask({ op: 'ask-end', from, engine, epoch, lease, how }, this.#hooks.nextAsk())
    if (!verdict.ok) return this.#refuse(peer, request, verdict.code, verdict.message)
    this.#replies.send(peer, { v: WIRE_VERSION, type: 'ended', id: request.id, ended: verdict.ended === true, traceparent: request.traceparent })
  }

  async #tell (peer: Buffer, request: AskOffer): Promise<void> {
    if (this.#misnamed(peer, request)) return
    const { id, lease, traceparent } = request
    const verdict = await this.#hooks.ask({ op: 'ask-offer', lease }, this.#hooks.nextAsk())
    if (!verdict.ok) this.#refuse(peer, request, verdict.code, verdict.message)
    else this.#replies.send(peer, { v: WIRE_VERSION, type: 'offered', id, offer: verdict.offer ?? {}, traceparent })
  }

  /** Sends chunks while any pull has credit, letting requests in between two of them. */
  #pump (): void {
    if (this.#pumping) return
    this.#pumping = true
    const run = async (): Promise<void> => {
      try {
        for (let next = this.#pick(); next !== undefined; next = this.#pick()) {
          await this.#sendChunk(...next)
          await nextTurn()
        }
      } finally {
        // In the turn in which there was nothing to pick: a credit may come in the next one.
        this.#pumping = false
      }
    }
    run().catch(this.#onBug)
  }

  #pick (): [string, Serving] | undefined {
    for (const [key, serving] of this.#servings) {
      if (!serving.mayPick || this.#full.has(serving.peerName)) continue
      const underWay = this.#ofPeer(serving.peerName).reduce((sum, other) => sum + other.outstanding, 0)
      if (underWay < MAX_PEER_CHUNKS) return [key, serving]
    }
  }

  async #sendChunk (key: string, serving: Serving): Promise<void> {
    this.#servings.delete(key)
    this.#servings.set(key, serving)
    const frames = serving.next()
    try {
      await this.#writer.send(frames)
      if (serving.done) {
        this.#settle(serving, 'done')
        this.#forgetTaken(serving)
      }
    } catch (err) {
      if ((err as NodeJS.ErrnoException).code !== 'EAGAIN') return this.#lost(serving.peerName, err)
      // What is under way to this peer is bounded, but not what it cancelled: the pipe may still be full of that.
      serving.refuse(frames)
      this.#full.add(serving.peerName)
      setTimeout(() => {
        this.#full.delete(serving.peerName)
        this.#pump()
      }, RETRY_FULL_MS).unref()
    }
  }

  /** Ends pulls whose peer has gone or takes nothing: a consumer killed in mid-pull must not hold blocks. */
  #checkPeers (): void {
    const now = performance.now()
    const probed = new Set<string>()
    for (const serving of [...this.#servings.values()]) {
      if (!serving.authorised) continue
      if (serving.outstanding > 0 && now - serving.progressAt > this.#data.stallTimeoutMs) {
        this.#refuse(serving.peer, serving.request, 'TIMEOUT', 'the pull made no progress')
        this.#drop(serving, 'stalled')
      } else if (!probed.has(serving.peerName)) {
        probed.add(serving.peerName)
        const alive: Reply = { v: WIRE_VERSION, type: 'alive', id: serving.request.id, traceparent: serving.request.traceparent }
        this.#writer.send([serving.peer, encodeHeader(alive)]).catch((err: unknown) => {
          if ((err as NodeJS.ErrnoException).code !== 'EAGAIN') this.#lost(serving.peerName, err)
        })
      }
    }
  }

  #lost (peerName: string, err: unknown): void {
    const code = (err as NodeJS.ErrnoException).code
    if (this.#socket.closed) return
    this.#hooks.log('debug', { code }, 'peer of a pull is lost')
    for (const serving of this.#ofPeer(peerName)) this.#drop(serving, 'peer-lost')
  }

  /** Nothing reads the blocks of this pull any more: its last chunk is a copy in zeromq's hands, or it ends early. */
  #settle (serving: Serving, outcome: ServedPull['outcome']): void {
    if (serving.settled) return
    serving.settled = true
    if (serving.authorised) this.#hooks.over(serving.ask, serving.report(outcome))
  }

  /** The peer has all chunks. Its last credit may come before or after zeromq says that the last chunk is handed over. */
  #forgetTaken (serving: Serving): void {
    if (serving.settled && serving.outstanding === 0) this.#forget(serving)
  }

  /** Its peer may have used the id again, for a pull that is another. */
  #forget (serving: Serving): void {
    const key = servingKey(serving.peer, serving.request.id)
    if (this.#servings.get(key) === serving) this.#servings.delete(key)
  }

  /** Forgets a pull, with the chunks it has under way. */
  #drop (serving: Serving, outcome: ServedPull['outcome']): void {
    this.#forget(serving)
    this.#settle(serving, outcome)
    this.#pump()
  }

  readonly #onBug = (err: unknown): void => this.#hooks.log('warn', { err: String(err) }, 'serving a request failed')

  #ofPeer (peerName: string): Serving[] {
    return [...this.#servings.values()].filter((serving) => serving.peerName === peerName)
  }

  #refuse (peer: Buffer, request: Request, code: P2PErrorCode, message: string): void {
    this.#replies.send(peer, { v: WIRE_VERSION, type: 'error', id: request.id, code, message, traceparent: request.traceparent })
  }
}

function servingKey (peer: Buffer, id: string): string {
  return `${peer.toString('hex')}/${id}`
}
