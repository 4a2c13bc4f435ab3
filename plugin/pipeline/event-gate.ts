import { JoinedBytes } from '../../adapters/joined-bytes.ts'

const LF = 0x0a
const CR = 0x0d

/** A comment, which clients of event streams skip. */
export const KEEP_ALIVE = Buffer.from(': keep-alive\n\n')

/** Longest unfinished event held back, in bytes; longer ones pass as they come. */
const MAX_HELD = 256 * 1024

/** Do these bytes end a server-sent event, that is, with an empty line? */
function endsEvent (bytes: Buffer): boolean {
  const { length } = bytes
  if (length < 2) return false
  const last = bytes[length - 1]
  if (last === LF) return bytes[length - 2] === LF || (length >= 4 && bytes[length - 2] === CR && bytes[length - 3] === LF && bytes[length - 4] === CR)
  return last === CR && bytes[length - 2] === CR
}

/** Offset behind the last whole event, 0 when there is none that ends behind `from`. */
function lastEventEnd (all: Buffer, from: number): number {
  // The longest end has four bytes.
  const skipped = Math.max(0, from - 3)
  const bytes = all.subarray(skipped)
  const lf = bytes.lastIndexOf('\n\n')
  const crlf = bytes.lastIndexOf('\r\n\r\n')
  const cr = bytes.lastIndexOf('\r\r')
  const end = Math.max(lf === -1 ? 0 : lf + 2, crlf === -1 ? 0 : crlf + 4, cr === -1 ? 0 : cr + 2)
  return end === 0 ? 0 : skipped + end
}

/**
 * Lets only whole server-sent events through, so that a node that breaks off in the middle of one leaves nothing that a
 * client can't parse. Bytes come out as they went in; nearly always a chunk is whole events, and the gate looks at its
 * last bytes only.
 */
export class EventGate {
  /** Does what has passed so far end an event? */
  atBoundary = true
  #held: JoinedBytes | undefined

  /** What may pass now; undefined when that is nothing. */
  pass (chunk: Buffer): Buffer | undefined {
    if (this.#held === undefined && endsEvent(chunk)) {
      this.atBoundary = true
      return chunk
    }
    return this.#passPart(chunk)
  }

  #passPart (chunk: Buffer): Buffer | undefined {
    const held = this.#held ??= new JoinedBytes()
    const before = held.bytes.length
    held.add(chunk)
    const { bytes } = held
    const end = lastEventEnd(bytes, before)
    if (bytes.length - end > MAX_HELD) {
      this.#held = undefined
      this.atBoundary = false
      return bytes
    }
    if (end === 0) return undefined
    this.#held = undefined
    if (end < bytes.length) (this.#held = new JoinedBytes()).add(bytes.subarray(end))
    this.atBoundary = true
    return bytes.subarray(0, end)
  }

  /** At a clean end: what is left, as it came. */
  rest (): Buffer | undefined {
    const rest = this.#held?.bytes
    this.#held = undefined
    return rest
  }

  /** The last event of a stream that has broken off. */
  errorEvent (error: object): Buffer {
    const event = `data: ${JSON.stringify({ error })}\n\n`
    return Buffer.from(this.atBoundary ? event : `\n\n${event}`)
  }
}
