import { encodeHeader, type Reply } from './wire.ts'
import type { Writer } from './writer.ts'

/** Between attempts at a peer whose pipe is full. */
const RETRY_MS = 5
/** Replies kept for one peer. Each answers a request of its own and is small, so this is what a peer that reads nothing can make us hold. */
const MAX_LATE = 4096

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
    else if (queue.length < MAX_LATE) queue.push(late)
  }

  /** Forgets what is still waiting. */
  close (): void {
    this.#late.clear()
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
    const queue = this.#late.get(name)
    if (queue !== undefined) {
      queue.push(late)
      return
    }
    this.#late.set(name, [late])
    this.#retryLater(name)
  }

  #retryLater (name: string): void {
    setTimeout(() => {
      this.#flush(name).catch(() => this.#late.delete(name))
    }, RETRY_MS).unref()
  }

  async #flush (name: string): Promise<void> {
    const queue = this.#late.get(name) ?? []
    while (queue.length > 0) {
      const head = queue[0] as Late
      if (head.until > performance.now() && !await this.#try(head)) return this.#retryLater(name)
      queue.shift()
    }
    this.#late.delete(name)
  }
}
