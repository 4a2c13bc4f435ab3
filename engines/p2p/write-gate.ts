const OPEN = 0
const WRITING = 1
const CLOSED = 2

/**
 * Guards the local blocks of one pull across threads. The transfer worker writes only between `enter` and `leave`; once
 * `close` has said true it can't enter any more. So the main thread may settle an aborted pull, and its caller free the
 * blocks, without waiting for the worker: nothing lands in them afterwards.
 */
export class WriteGate {
  readonly #state: Int32Array

  constructor (memory: SharedArrayBuffer = new SharedArrayBuffer(8)) {
    this.#state = new Int32Array(memory)
  }

  get memory (): SharedArrayBuffer {
    return this.#state.buffer as SharedArrayBuffer
  }

  /** Worker: may I write? */
  enter (): boolean {
    return Atomics.compareExchange(this.#state, 0, OPEN, WRITING) === OPEN
  }

  /** Worker: done writing. */
  leave (): void {
    Atomics.store(this.#state, 1, 1)
    Atomics.compareExchange(this.#state, 0, WRITING, OPEN)
  }

  /** Something has been written. */
  get begun (): boolean {
    return Atomics.load(this.#state, 1) === 1
  }

  /** Main thread: no more writing. False when a write is under way just now: then the worker's answer must be awaited. */
  close (): boolean {
    const before = Atomics.compareExchange(this.#state, 0, OPEN, CLOSED)
    return before !== WRITING
  }
}
