import { MessageChannel } from 'node:worker_threads'

/** How much is collected before it is given back, in bytes. */
const BATCH_BYTES = 256 * 1024

/**
 * Gives the memory of used-up buffers back at once.
 *
 * Every chunk Node reads is memory outside of the JavaScript heap, which the collector does not hurry to free: a
 * 10 MB body would cost 20 MB. Moving buffers to a port and closing it is the one way to free them now that all
 * versions of Node have (`ArrayBuffer.prototype.transfer` came with 22).
 */
export class Recycler {
  #batch: ArrayBuffer[] = []
  #bytes = 0

  /** Frees the chunk's memory soon. Nothing may hold another view of it. */
  add (chunk: Buffer): void {
    const { buffer } = chunk
    // A slice of something bigger: not ours to free.
    if (!(buffer instanceof ArrayBuffer) || chunk.byteLength !== buffer.byteLength || chunk.byteLength === 0) return
    this.#batch.push(buffer)
    this.#bytes += chunk.byteLength
    if (this.#bytes >= BATCH_BYTES) this.flush()
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
