import type { ServerResponse } from 'node:http'
import type { Socket } from 'node:net'

/** By connection, so that each gets one listener, however many requests are pipelined on it. */
const pipelined = new WeakMap<Socket, Set<() => void>>()

/**
 * Calls the listener when the response is closed, maybe twice. A response that waits behind an earlier one on its
 * connection (pipelining) has no socket yet, and Node.js 20 does not close it when the connection dies: then the
 * connection's own `close` counts.
 */
export function onClosed (response: ServerResponse, listener: () => void): void {
  response.on('close', listener)
  if (response.socket !== null) return
  const { socket } = response.req
  let listeners = pipelined.get(socket)
  if (listeners === undefined) {
    const all = listeners = new Set<() => void>()
    pipelined.set(socket, all)
    socket.once('close', () => { for (const one of all) one() })
  }
  listeners.add(listener)
  response.once('close', () => { listeners.delete(listener) })
}

/**
 * Calls the listener when the client leaves before the answer is whole; at once when it has left. Not `request.signal`:
 * that one aborts as soon as the request body has been read (fastify#6725, nodejs/node#63532).
 */
export function onClientGone (response: ServerResponse, listener: () => void): void {
  // writableEnded, because HTTP/2 calls cancelled streams finished (sveltejs/kit#16793).
  const closed = (): void => { if (!response.writableEnded) listener() }
  if (response.destroyed || (response.socket === null && response.req.socket.destroyed)) closed()
  else onClosed(response, closed)
}
