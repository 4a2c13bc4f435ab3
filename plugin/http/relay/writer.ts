import { OutgoingMessage, ServerResponse } from 'node:http'
import { Socket } from 'node:net'

/** Bodies up to this size are sent as one string with their head, and chunks with their frame, in bytes. */
const SHORT = 16 * 1024

/** Takes a body in pieces; `write` returns false when the client does not keep up. */
export interface BodyWriter {
  write (chunk: Buffer): boolean
  onDrain (resume: () => void): void
}

/**
 * Ends a response with its whole body. node:http joins strings with the head and sends both in one plain write, where a
 * buffer costs a gathered one; latin1 gives every byte back as it was.
 */
export function endWith (response: ServerResponse, body: Buffer): void {
  if (body.length <= SHORT && isPlain(response)) response.end(body.toString('latin1'), 'latin1')
  else response.end(body)
}

/** How the rest of this response, of which something has been written, is best written. */
export function writerFor (response: ServerResponse): BodyWriter {
  const { socket } = response
  // Without a socket the response waits behind an earlier one on the same connection (pipelining).
  if (isPlain(response) && response.chunkedEncoding && socket instanceof Socket) return new SocketWriter(response, socket)
  return new ResponseWriter(response)
}

/** Not HTTP/2, and nobody (compression, instrumentation) has put a write of their own in place of node:http's. */
function isPlain (response: ServerResponse): boolean {
  return response instanceof ServerResponse && response.write === OutgoingMessage.prototype.write && response.end === OutgoingMessage.prototype.end
}

/** The ordinary way: node:http frames every chunk. */
class ResponseWriter implements BodyWriter {
  readonly #response: ServerResponse

  constructor (response: ServerResponse) {
    this.#response = response
  }

  write (chunk: Buffer): boolean {
    return this.#response.write(chunk)
  }

  onDrain (resume: () => void): void {
    this.#response.once('drain', resume)
  }
}

/**
 * Writes HTTP/1.1 chunks (RFC 9112, section 7.1) straight to the socket: node:http would make four writes of each, to be
 * gathered again. The response still writes the head, the first chunk and the end.
 */
class SocketWriter implements BodyWriter {
  readonly #response: ServerResponse
  readonly #socket: Socket

  constructor (response: ServerResponse, socket: Socket) {
    this.#response = response
    this.#socket = socket
  }

  write (chunk: Buffer): boolean {
    const { length } = chunk
    const socket = this.#socket
    // A chunk of no bytes would end the body.
    if (length === 0) return true
    if (this.#response.socket !== socket || length > SHORT) return this.#response.write(chunk)
    return socket.write(`${length.toString(16)}\r\n${chunk.toString('latin1')}\r\n`, 'latin1')
  }

  onDrain (resume: () => void): void {
    this.#socket.once('drain', resume)
  }
}
