import { Readable } from 'node:stream'
import type { FastifyReply } from 'fastify'
import type { ChatAnswer } from '../service/engine-service.ts'
import { EngineError, errorEvent } from '../service/errors.ts'
import type { Flight } from './in-flight.ts'

/**
 * Aborts the flight when the client goes away. Fastify's own `request.signal` (and Node's) aborts as soon as the body
 * of a POST is read (fastify#6725, nodejs/node#63532), so the response's end tells: closed before it was ended.
 */
export function abortWhenClientGone (reply: FastifyReply, flight: Flight): void {
  const { raw } = reply
  const check = (): void => {
    if (!raw.writableEnded) flight.abort(new EngineError('cancelled', 'The client closed the connection.'))
  }
  if (raw.destroyed) check()
  else raw.once('close', check)
}

/**
 * Sends an engine's answer. `ended` is called once when nothing more will be sent, however that came about.
 * Back-pressure and tear-down are the stream's: a slow client stops the iterator, a lost one calls its `return`.
 */
export function sendAnswer (reply: FastifyReply, answer: ChatAnswer, ended: () => void): FastifyReply {
  reply.code(answer.status)
  if (answer.headers !== undefined) reply.headers(answer.headers)
  if ('json' in answer) {
    ended()
    return reply.send(answer.json)
  }
  reply.headers({ 'content-type': 'text/event-stream; charset=utf-8', 'cache-control': 'no-cache', 'x-accel-buffering': 'no' })
  return reply.send(Readable.from(events(answer.stream, reply, ended), { objectMode: false }))
}

async function * events (stream: AsyncIterable<Buffer>, reply: FastifyReply, ended: () => void): AsyncGenerator<Buffer> {
  try {
    yield * stream
  } catch (err) {
    // The head is out: what went wrong can only be told in the stream. A client that caused it by leaving hears nothing.
    if (!EngineError.is(err)) reply.log.error({ err }, 'stream failed')
    yield errorEvent(err)
  } finally {
    ended()
  }
}
