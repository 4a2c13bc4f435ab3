import type { ServerResponse } from 'node:http'
import type { Socket } from 'node:net'

type Listener = () => void

/** By connection, as each gets one listener, however many requests are pipelined on it. */
const queued = new WeakMap<Socket, Set<Listener>>()

/**
 * Calls the listener when the response is closed, maybe twice. One that waits behind an earlier answer on its connection
 * (pipelining) has no socket yet, and Node.js 20 does not close it when the connection dies: then the connection tells.
 */
export function onClosed (response: ServerResponse, listener: Listener): void {
  response.on('close', listener)
  if (response.socket !== null) return
  const listeners = listenersOf(response.req.socket)
  listeners.add(listener)
  response.once('close', () => { listeners.delete(listener) })
}

export function offClosed (response: ServerResponse, listener: Listener): void {
  response.off('close', listener)
  queued.get(response.req.socket)?.delete(listener)
}

export function isClosed (response: ServerResponse): boolean {
  return response.destroyed || (response.socket === null && response.req.socket.destroyed)
}

function listenersOf (socket: Socket): Set<Listener> {
  let listeners = queued.get(socket)
  if (listeners === undefined) {
    const all = listeners = new Set()
    queued.set(socket, all)
    socket.once('close', () => { for (const listener of all) listener() })
  }
  return listeners
}
