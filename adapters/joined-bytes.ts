/** What has come, in one buffer whose room doubles: many small chunks are not copied again for each that follows. */
export class JoinedBytes {
  bytes: Buffer = Buffer.alloc(0)
  #room: Buffer | undefined

  add (chunk: Buffer): void {
    const { length } = this.bytes
    if (length === 0) { this.bytes = chunk; return }
    const needed = length + chunk.length
    if (this.#room === undefined || this.#room.length < needed) {
      this.#room = Buffer.allocUnsafeSlow(2 * needed)
      this.#room.set(this.bytes)
    }
    this.#room.set(chunk, length)
    this.bytes = this.#room.subarray(0, needed)
  }
}
