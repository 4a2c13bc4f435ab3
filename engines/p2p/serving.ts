import { encodeHeader, type Reply, MAX_CHUNK_BYTES, MAX_WINDOW, MIN_CHUNK_BYTES, WIRE_VERSION, type Pull } from './wire.ts'
import type { Writer } from './sockets.ts'
import { gather, type BlockMemory } from './block-copy.ts'
import { ELEMENT_BYTES, type ServedPull } from './types.ts'

/** Between attempts at a peer whose pipe is full. */
const RETRY_MS = 5
/** Replies kept for one peer. Each answers a request of its own and is small, so this is what a peer that reads nothing can make us hold. */
const MAX_LATE = 4096
/** Over all peers: one that calls itself many is still one. */
export const MAX_LATE_IN_ALL = 16_384

interface Late {
  readonly frames: Buffer[]
  readonly until: number
}

/**
 * Small replies to peers. One that finds the pipe to its peer full (of chunks, or of replies to a burst of requests) waits
 * here for room: were it dropped, an ACK that has ended its lease, or a pull that was refused, would look like a timeout.
 */
export class Replies {
  readonly #writer: Writer
  readonly #keepMs: number
  readonly #late = new Map<string, Late[]>()
  #waiting = 0

  /** @param keepMs how long a reply waits for room; a peer that has taken nothing for so long waits no more itself */
  constructor (writer: Writer, keepMs: number) {
    this.#writer = writer
    this.#keepMs = keepMs
  }

  send (peer: Buffer, reply: Reply): void {
    const name = peer.toString('hex')
    const late: Late = { frames: [peer, encodeHeader(reply)], until: performance.now() + this.#keepMs }
    const queue = this.#late.get(name)
    if (queue === undefined) this.#try(late).then((sent) => { if (!sent) this.#keep(name, late) }, () => { /* the peer has gone */ })
    else this.#push(queue, late)
  }

  /** How many wait for room. */
  get waiting (): number {
    return this.#waiting
  }

  /** Forgets what is still waiting. */
  close (): void {
    this.#late.clear()
    this.#waiting = 0
  }

  /** False when there is no room; rejects when there is no peer any more. */
  async #try ({ frames }: Late): Promise<boolean> {
    try {
      await this.#writer.send(frames)
      return true
    } catch (err) {
      if ((err as NodeJS.ErrnoException).code !== 'EAGAIN') throw err
      return false
    }
  }

  #keep (name: string, late: Late): void {
    const known = this.#late.get(name)
    const queue = known ?? []
    this.#push(queue, late)
    if (known !== undefined || queue.length === 0) return
    this.#late.set(name, queue)
    this.#retryLater(name)
  }

  #push (queue: Late[], late: Late): void {
    if (queue.length >= MAX_LATE || this.#waiting >= MAX_LATE_IN_ALL) return
    queue.push(late)
    this.#waiting++
  }

  #forget (name: string): void {
    this.#waiting -= this.#late.get(name)?.length ?? 0
    this.#late.delete(name)
  }

  #retryLater (name: string): void {
    setTimeout(() => {
      this.#flush(name).catch(() => { this.#forget(name) })
    }, RETRY_MS).unref()
  }

  async #flush (name: string): Promise<void> {
    const queue = this.#late.get(name)
    if (queue === undefined) return
    while (queue.length > 0) {
      const head = queue[0] as Late
      if (head.until > performance.now() && !await this.#try(head)) return this.#retryLater(name)
      if (this.#late.get(name) !== queue) return
      queue.shift()
      this.#waiting--
    }
    this.#forget(name)
  }
}

/** One pull as the server sees it: how far it got, and how far the peer lets it go. */
export class Serving {
  readonly peer: Buffer
  readonly peerName: string
  readonly request: Pull
  readonly ask: number
  readonly startedAt = performance.now()
  /** The lease table has agreed. */
  authorised = false
  /** The pull is over for the lease table: its last chunk was handed over, or it ended early. */
  settled = false
  progressAt = performance.now()
  readonly #memory: BlockMemory
  readonly #chunkBytes: number
  readonly #window: number
  #seq = 0
  #offset = 0
  #upto: number
  /** Buffers of chunks on their way, oldest first, and those that may be filled again. */
  readonly #sent: Buffer[] = []
  readonly #spare: Buffer[] = []
  /** A chunk that zeromq had no room for, to be sent again. */
  #refused: Buffer[] | undefined

  constructor (peer: Buffer, request: Pull, ask: number, memory: BlockMemory) {
    this.peer = peer
    this.peerName = peer.toString('hex')
    this.request = request
    this.ask = ask
    this.#memory = memory
    this.#chunkBytes = Math.min(Math.max(request.chunk, MIN_CHUNK_BYTES), MAX_CHUNK_BYTES)
    this.#window = Math.min(Math.max(request.window, 1), MAX_WINDOW)
    this.#upto = this.#window
  }

  /** Every chunk was handed to zeromq. */
  get done (): boolean {
    return this.#offset >= this.request.bytes && this.#refused === undefined
  }

  get mayPick (): boolean {
    return this.authorised && !this.settled && (this.#refused !== undefined || this.#seq < this.#upto)
  }

  /** Chunks sent that the peer has not said to have taken. */
  get outstanding (): number {
    return this.#seq - (this.#upto - this.#window)
  }

  /** A credit can't grant more than a window beyond what was sent: a peer that lies gains nothing. */
  credit (upto: number): void {
    const granted = Math.min(upto, this.#seq + this.#window)
    if (granted <= this.#upto) return
    this.#upto = granted
    this.progressAt = performance.now()
    while (this.#sent.length > this.outstanding) this.#spare.push(this.#sent.shift() as Buffer)
  }

  /**
   * The next chunk as frames. The bytes are copied: zeromq sends from the buffer it is given long after `send` resolved. So a
   * buffer is filled again only when the peer has said to have its chunk, and only in the same pull: whatever a peer claims,
   * it can't get at bytes of another lease. (Fresh buffers cost a fifth more CPU, in page faults.)
   */
  next (): Buffer[] {
    const again = this.#refused
    this.#refused = undefined
    if (again !== undefined) return again
    const { id, blocks, bytes, traceparent } = this.request
    const { dtype } = this.#memory
    const size = Math.min(this.#chunkBytes, bytes - this.#offset)
    const buffer = this.#spare.pop() ?? Buffer.allocUnsafeSlow(size)
    this.#sent.push(buffer)
    const payload = buffer.subarray(0, size)
    const crc32 = gather(this.#memory, blocks, this.#offset, payload)
    const header = encodeHeader({
      v: WIRE_VERSION,
      type: 'chunk',
      id,
      seq: this.#seq,
      offset: this.#offset,
      dtype,
      dims: [payload.length / ELEMENT_BYTES[dtype]],
      crc32,
      traceparent
    })
    if (this.outstanding === 0) this.progressAt = performance.now()
    this.#seq++
    this.#offset += payload.length
    return [this.peer, header, payload]
  }

  /** zeromq had no room for these frames. */
  refuse (frames: Buffer[]): void {
    this.#refused = frames
  }

  report (outcome: ServedPull['outcome']): ServedPull {
    const { from, lease, pool, blocks, traceparent } = this.request
    return { engine: from, lease, pool, blocks: blocks.length, bytes: this.#offset, ms: performance.now() - this.startedAt, outcome, traceparent }
  }
}
