import { scatter, type BlockMemory } from './block-copy.ts'
import { P2PError } from './errors.ts'
import type { PullCall } from './messages.ts'
import type { Chunk } from './wire.ts'
import { WriteGate } from './write-gate.ts'

/** One pull as the receiver sees it: which chunk comes next, and where its bytes go. */
export class Incoming {
  readonly pull: PullCall
  readonly #memory: BlockMemory
  readonly #gate: WriteGate
  readonly #window: number
  #seq = 0
  #received = 0

  constructor (pull: PullCall, memory: BlockMemory, window: number) {
    this.pull = pull
    this.#memory = memory
    this.#gate = new WriteGate(pull.gate)
    this.#window = window
  }

  get done (): boolean {
    return this.#received === this.pull.bytes
  }

  /** What to grant after the last chunk; it also says which chunks were taken, so it is due after every one. */
  get credit (): number {
    return this.#seq + this.#window
  }

  /**
   * Writes a chunk into the local blocks. False when it does not count: seen before, or the pull was given up. Throws
   * CORRUPT when its bytes are not those that were sent; what was written by then is worth nothing, as the pull has failed.
   */
  accept (header: Chunk, payload: Buffer): boolean {
    if (header.seq < this.#seq) return false
    const { bytes } = this.pull
    if (header.seq !== this.#seq || header.offset !== this.#received || payload.length === 0 || this.#received + payload.length > bytes) {
      throw new P2PError('CORRUPT', `chunk ${header.seq} at ${header.offset} (${payload.length} bytes) is not the one expected`)
    }
    if (!this.#gate.enter()) return false
    try {
      const crc = scatter(this.#memory, this.pull.localBlocks, this.#received, payload)
      if (crc !== header.crc32) throw new P2PError('CORRUPT', `chunk ${header.seq} at ${header.offset} failed its checksum`)
    } finally {
      this.#gate.leave()
    }
    this.#seq++
    this.#received += payload.length
    return true
  }
}
