import { scatter, type BlockMemory } from './block-copy.ts'
import { ELEMENT_BYTES, P2PError } from './types.ts'
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
   * CORRUPT when its bytes are not those that were sent, INVALID when these are no numbers of this model; what was written
   * by then is worthless because the pull has failed.
   */
  accept (header: Chunk, payload: Buffer): boolean {
    if (header.seq < this.#seq) return false
    const { bytes, engineId } = this.pull
    if (header.seq !== this.#seq || header.offset !== this.#received || payload.length === 0 || this.#received + payload.length > bytes) {
      throw new P2PError('CORRUPT', `${engineId}: chunk ${header.seq} at ${header.offset} (${payload.length} bytes) is not the one expected`)
    }
    const { dtype } = this.#memory
    const last = this.#received + payload.length === bytes
    const elements = header.dims.reduce((product, n) => product * n, 1)
    if (header.dtype !== dtype || elements * ELEMENT_BYTES[dtype] !== payload.length || (payload.length % 4 !== 0 && !last)) {
      throw new P2PError('INVALID', `${engineId} sent ${header.dtype} of [${header.dims.join(', ')}] in ${payload.length} bytes, not ${dtype} in whole words`)
    }
    if (!this.#gate.enter()) return false
    try {
      const { crc, finite } = scatter(this.#memory, this.pull.localBlocks, this.#received, payload)
      if (crc !== header.crc32) throw new P2PError('CORRUPT', `${engineId}: chunk ${header.seq} at ${header.offset} failed its checksum`)
      if (!finite) throw new P2PError('INVALID', `${engineId} sent numbers that are not finite`)
    } finally {
      this.#gate.leave()
    }
    this.#seq++
    this.#received += payload.length
    return true
  }
}
