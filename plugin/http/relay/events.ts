const LF = 0x0a
const CR = 0x0d

/** Longest unfinished event held back, in bytes; longer ones pass as they come. */
const MAX_HELD = 256 * 1024

/** Do these bytes end a server-sent event, which is to say: with an empty line? */
export function endsEvent (bytes: Buffer): boolean {
  const { length } = bytes
  if (length < 2) return false
  const last = bytes[length - 1]
  if (last === LF) return bytes[length - 2] === LF || (length >= 4 && bytes[length - 2] === CR && bytes[length - 3] === LF && bytes[length - 4] === CR)
  return last === CR && bytes[length - 2] === CR
}

/** Offset behind the last whole event, 0 when there is none. */
function lastEventEnd (bytes: Buffer): number {
  const lf = bytes.lastIndexOf('\n\n')
  const crlf = bytes.lastIndexOf('\r\n\r\n')
  const cr = bytes.lastIndexOf('\r\r')
  return Math.max(lf === -1 ? 0 : lf + 2, crlf === -1 ? 0 : crlf + 4, cr === -1 ? 0 : cr + 2)
}

/**
 * Lets only whole events through, so that an upstream which breaks off in the middle of one leaves nothing a client
 * can't parse. Bytes come out as they went in; nearly always a chunk is whole events and passes at the cost of a look
 * at its last bytes.
 */
export class EventGate {
  #held: Buffer | undefined
  /** Whether what has passed so far ends an event. */
  atBoundary = true

  /** What may pass now; undefined when that is nothing. */
  pass (chunk: Buffer): Buffer | undefined {
    if (this.#held === undefined && endsEvent(chunk)) {
      this.atBoundary = true
      return chunk
    }
    return this.#passPart(chunk)
  }

  #passPart (chunk: Buffer): Buffer | undefined {
    const bytes = this.#held === undefined ? chunk : Buffer.concat([this.#held, chunk])
    const end = lastEventEnd(bytes)
    if (bytes.length - end > MAX_HELD) {
      this.#held = undefined
      this.atBoundary = false
      return bytes
    }
    this.#held = end === bytes.length ? undefined : bytes.subarray(end)
    if (end === 0) return undefined
    this.atBoundary = true
    return bytes.subarray(0, end)
  }

  /** At a clean end: what is left, as it came. */
  rest (): Buffer | undefined {
    const rest = this.#held
    this.#held = undefined
    return rest
  }
}

/** The `error` object of OpenAI's shape, for streams that break off. */
export interface StreamError {
  readonly message: string
  readonly type: string
  readonly code: string | null
  readonly param: string | null
}

/** The last event of a stream that has broken off behind what this gate has let pass. */
export function errorEvent (error: StreamError, gate: EventGate): Buffer {
  const event = `data: ${JSON.stringify({ error })}\n\n`
  return Buffer.from(gate.atBoundary ? event : `\n\n${event}`)
}
