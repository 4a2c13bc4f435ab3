import { IncomingMessage } from 'node:http'
import { Socket } from 'node:net'
import type { Readable } from 'node:stream'
import { MessageChannel } from 'node:worker_threads'
import { Pace } from './pace.ts'

/** Chunks of smaller bodies are left to the garbage collector: freeing them would cost more than it gives, in bytes. */
export const RECYCLE_FROM = 4 << 20
/** How much of a chunked body is joined between two looks at the clock, in bytes. */
const JOIN_BYTES = 1 << 20
/** How much memory is collected before it is freed, in bytes. */
const RECYCLE_BATCH = 256 * 1024

/** Chunks are freed as they are copied, so that both never exist in full. */
export async function join (chunks: Buffer[], length: number, recycler: Recycler | undefined): Promise<Buffer> {
  const body = Buffer.allocUnsafeSlow(length)
  const pace = new Pace()
  let filled = 0
  let rested = 0
  for (const chunk of chunks) {
    chunk.copy(body, filled)
    filled += chunk.length
    recycler?.add(chunk)
    if (filled - rested >= JOIN_BYTES && pace.due()) {
      rested = filled
      await pace.rest()
    }
  }
  recycler?.flush()
  return body
}

/** Chunks can be freed only when they come straight from a socket and have no other listener. */
export function recyclerFor (request: Readable): Recycler | undefined {
  const direct = request instanceof IncomingMessage && request.socket instanceof Socket && request.listenerCount('data') <= 1
  return direct ? new Recycler() : undefined
}

/**
 * Frees the memory of copied chunks at once.
 *
 * Chunks lie outside of the JavaScript heap, where garbage collection comes late: a 10 MB body would cost 20 MB. Moving
 * buffers to a port and closing it frees them in all supported versions of Node (`ArrayBuffer.prototype.transfer` came with 22).
 */
export class Recycler {
  #batch: ArrayBuffer[] = []
  #bytes = 0

  /** Frees the chunk's memory soon. No other view of it may exist. */
  add (chunk: Buffer): void {
    const { buffer } = chunk
    // A slice of a larger buffer belongs to others too.
    if (!(buffer instanceof ArrayBuffer) || chunk.byteLength !== buffer.byteLength || chunk.byteLength === 0) return
    this.#batch.push(buffer)
    this.#bytes += chunk.byteLength
    if (this.#bytes >= RECYCLE_BATCH) this.flush()
  }

  flush (): void {
    if (this.#batch.length === 0) return
    const { port1, port2 } = new MessageChannel()
    port1.postMessage(null, this.#batch)
    port2.close()
    this.#batch = []
    this.#bytes = 0
  }
}
