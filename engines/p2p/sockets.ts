import type { MessageLike } from 'zeromq'
import type { WorkerData } from './messages.ts'

const HEARTBEATS_MISSED = 5

/**
 * Options of every socket. Nothing may hang: sends time out, a dead peer is noticed by heartbeats, and closing never waits
 * for unsent bytes (linger).
 */
export function commonOptions (data: WorkerData): { linger: number, ipv6: boolean, heartbeatInterval: number, heartbeatTimeout: number, heartbeatTimeToLive: number } {
  return {
    linger: 0,
    ipv6: data.tcp.startsWith('tcp://['),
    heartbeatInterval: data.heartbeatMs,
    // Generous because heartbeats queue behind chunks: a slow wire is no dead peer. The closed socket shows a dead one.
    heartbeatTimeout: HEARTBEATS_MISSED * data.heartbeatMs,
    heartbeatTimeToLive: (HEARTBEATS_MISSED + 1) * data.heartbeatMs
  }
}

interface Sendable {
  readonly closed: boolean
  send (message: MessageLike[]): Promise<void>
}

/**
 * The only writer of a socket. zeromq allows one pending `send` per socket, the second throws at once (EBUSY); so messages
 * queue here. What bounds the queue is not here: chunks are bounded by credit, everything else by the requests under way.
 */
export class Writer {
  readonly #socket: Sendable
  #tail: Promise<void> = Promise.resolve()

  constructor (socket: Sendable) {
    this.#socket = socket
  }

  /** Resolves when zeromq has taken the message, and rejects when it did not (EAGAIN, EHOSTUNREACH, closed socket). */
  send (frames: MessageLike[]): Promise<void> {
    const sent = this.#tail.then(async () => {
      if (this.#socket.closed) throw Object.assign(new Error('socket is closed'), { code: 'EBADF' })
      await this.#socket.send(frames)
    })
    this.#tail = sent.catch(() => {})
    return sent
  }
}
