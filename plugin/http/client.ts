/** The client's side of a request: it may leave, and it gets the answer. */
import type { ServerResponse } from 'node:http'
import type { Http2Stream } from 'node:http2'
import type { Socket } from 'node:net'
import { Readable } from 'node:stream'
import type { FastifyReply } from 'fastify'
import { isEventStream } from '../../adapters/http.ts'
import type { Answer } from '../pipeline/index.ts'

/** By connection, so that each gets one listener, however many requests are pipelined on it. */
const pipelined = new WeakMap<Socket, Set<() => void>>()

/** RFC 9113, section 7. Without it an HTTP/2 answer that is cut looks whole. */
const INTERNAL_ERROR = 2
/** `destroyed` says nothing of one of HTTP/2. */
type ClientResponse = ServerResponse & { readonly stream?: Http2Stream }

/**
 * Calls the listener when the response is closed, maybe twice; at once when it is. A response that waits behind an earlier
 * one on its connection (pipelining) has no socket, and Node.js 20 does not close it when the connection dies.
 */
export function onClosed (response: ClientResponse, listener: () => void): void {
  const { stream, req: { socket } } = response
  const waits = response.socket === null
  if (response.destroyed || stream?.closed === true || (waits && socket.destroyed)) { listener(); return }
  response.on('close', listener)
  // Nothing else tells of a reset without an error while the client's window is full.
  stream?.once('aborted', listener)
  if (!waits) return
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
export function onClientGone (response: ClientResponse, listener: () => void): void {
  // writableEnded, because HTTP/2 calls cancelled streams finished (sveltejs/kit#16793).
  onClosed(response, () => { if (!response.writableEnded) listener() })
}

/** Headers of one hop (RFC 9110, section 7.6.1), and those that are the gateway's own to send: a node's cookie would be set for the gateway's name. */
const NOT_PASSED: ReadonlySet<string> = new Set([
  'connection', 'keep-alive', 'proxy-connection', 'proxy-authenticate', 'proxy-authorization', 'proxy-authentication-info', 'te', 'trailer',
  'transfer-encoding', 'upgrade', 'date', 'server', 'set-cookie', 'alt-svc', 'strict-transport-security'
])
/** What node:http refuses in a header's value. */
const INVALID_VALUE = /[^\t\x20-\x7e\x80-\xff]/

/**
 * Sends a node's answer to the client, by `reply.send`, so that onSend hooks of the application see it. Headers already
 * set on the reply (CORS, rate limit) stay, `extra` come on top.
 */
export function deliver (answer: Answer, reply: FastifyReply, extra: Readonly<Record<string, string>>): void {
  reply.code(answer.statusCode)
  passHeaders(answer, reply)
  for (const name in extra) reply.header(name, extra[name])
  if (answer.body instanceof Readable) followStream(answer.body, answer, reply.raw)
  reply.send(answer.body)
}

function followStream (body: Readable, { headers }: Answer, raw: ClientResponse): void {
  const length = headers['content-length']
  if (!isEventStream(headers) && length !== undefined && headers['transfer-encoding'] === undefined) {
    // The length holds only where no onSend hook has put another body in the answer's place.
    raw.once('pipe', source => { if (source === body) raw.setHeader('content-length', length) })
  }
  // A hook may fail, so that the answer is never read, or pipe it on, so that its error reaches nothing.
  onClosed(raw, () => { body.destroy() })
  body.once('error', () => { raw.stream === undefined ? raw.destroy() : raw.stream.close(INTERNAL_ERROR) })
}

/** A node's CORS headers are left out: the gateway decides who may read answers. */
export function passHeaders ({ headers }: Pick<Answer, 'headers'>, reply: FastifyReply): void {
  const dropped = new Set(String(headers.connection ?? '').toLowerCase().split(',').map(name => name.trim()))
  for (const name in headers) {
    const value = headers[name]
    if (value === undefined || NOT_PASSED.has(name) || name === 'content-length' || name.startsWith('access-control-') || dropped.has(name)) continue
    // The reply's idea of the type is of another body.
    if (reply.hasHeader(name) && name !== 'content-type') continue
    if (!INVALID_VALUE.test(String(value))) reply.header(name, value)
  }
  if (!isEventStream(headers)) return
  if (!reply.hasHeader('cache-control')) reply.header('cache-control', 'no-cache')
  // nginx in front would collect events otherwise.
  if (!reply.hasHeader('x-accel-buffering')) reply.header('x-accel-buffering', 'no')
}
