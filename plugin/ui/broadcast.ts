import type { ServerResponse } from 'node:http'

export interface BroadcastOptions {
  /** Clients at the same time. */
  readonly maxClients: number
  /** Milliseconds between two messages. */
  readonly interval: number
  /** Called once for all clients. */
  readonly message: () => string
  /** Called when the first client joins, and when the last one leaves. */
  readonly onStart: () => void
  readonly onStop: () => void
}

interface Client { readonly response: ServerResponse, stalled: number }

/** Ticks in a row a client may leave unread before it is disconnected. */
const MAX_STALLED = 15

/**
 * Server-sent events to a bounded number of clients. Each message is complete, so a slow client skips messages instead of
 * queueing them, and a client that reads nothing is disconnected. The timer runs only while there are clients.
 */
export class Broadcast {
  readonly #options: BroadcastOptions
  readonly #clients = new Set<Client>()
  #timer: NodeJS.Timeout | undefined
  #closed = false

  constructor (options: BroadcastOptions) {
    this.#options = options
  }

  get full (): boolean {
    return this.#closed || this.#clients.size >= this.#options.maxClients
  }

  get size (): number {
    return this.#clients.size
  }

  /** Takes the response over until its client leaves. */
  add (response: ServerResponse): void {
    const client: Client = { response, stalled: 0 }
    response.on('error', () => {})
    response.once('close', () => { this.#leave(client) })
    if (response.destroyed) return
    this.#clients.add(client)
    if (this.#timer === undefined) {
      this.#options.onStart()
      this.#timer = setInterval(() => { this.#tick() }, this.#options.interval)
    }
    response.write(frame(this.#options.message()))
  }

  close (): void {
    this.#closed = true
    for (const { response } of this.#clients) response.end()
  }

  #tick (): void {
    const chunk = frame(this.#options.message())
    for (const client of this.#clients) {
      const { response } = client
      if (response.writableLength === 0) {
        client.stalled = 0
        response.write(chunk)
      } else if (++client.stalled >= MAX_STALLED) response.destroy()
    }
  }

  #leave (client: Client): void {
    if (!this.#clients.delete(client) || this.#clients.size > 0) return
    clearInterval(this.#timer)
    this.#timer = undefined
    this.#options.onStop()
  }
}

function frame (json: string): Buffer {
  return Buffer.from(`data: ${json}\n\n`)
}
