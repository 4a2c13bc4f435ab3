import type { ServerResponse } from 'node:http'
import type { FastifyReply } from 'fastify'
import { isClosed, onClosed } from './closed.ts'

/** Why a request ended when its client left. Not a failure of anybody. */
export class ClientGoneError extends Error {
  readonly code = 'client_closed'
  readonly statusCode = 499

  constructor () {
    super('The client closed the connection')
    this.name = 'ClientGoneError'
  }
}

/**
 * Aborts when the client leaves before the answer is whole.
 *
 * Not `request.signal`: that one aborts as soon as the request body has been read (fastify#6725, nodejs/node#63532).
 */
export function clientGone (reply: FastifyReply | ServerResponse): AbortSignal {
  const controller = new AbortController()
  const raw = rawOf(reply)
  // writableEnded, as HTTP/2 calls cancelled streams finished (sveltejs/kit#16793).
  const end = (): void => { if (!raw.writableEnded) controller.abort(new ClientGoneError()) }
  if (isClosed(raw)) end()
  else onClosed(raw, end)
  return controller.signal
}

export function rawOf (reply: FastifyReply | ServerResponse): ServerResponse {
  return 'hijack' in reply ? reply.raw : reply
}
