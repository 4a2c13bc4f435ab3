import { randomUUID } from 'node:crypto'
import { Readable } from 'node:stream'
import type { FastifyInstance, FastifyReply, FastifyRequest } from 'fastify'
import { AGAIN_HEADER, AHEAD_HEADER, CONSUMER_HEADER, OVERLAP_HEADER, REQUEST_ID_HEADER } from '../../adapters/wire/headers.ts'
import { isObject, textOf, type Json } from '../../adapters/wire/json.ts'
import { TENANT_FIELD } from '../../adapters/wire/results.ts'
import type { ChatAnswer, ChatCall, EngineService } from '../service/engine-service.ts'
import { EngineError, errorEvent } from '../service/errors.ts'
import type { Flight } from './in-flight.ts'
import type { ServerState } from './state.ts'
import { contextOf } from './trace-context.ts'

const REQUEST_ID = /^[\x21-\x7e]{1,128}$/
const CREATED = Math.floor(Date.now() / 1_000)

/** Time for the error of an aborted request to reach its client. */
const ABORTED_GRACE_MS = 1_000

type Serve = (call: ChatCall) => Promise<ChatAnswer>

/** POST /v1/chat/completions, /v1/completions and /v1/responses, GET /v1/models. */
export function openaiRoutes (app: FastifyInstance, state: ServerState, unreadTimeoutMs: number): void {
  const serving = { state, unreadTimeoutMs }
  app.post('/v1/chat/completions', (request, reply) => serve(serving, request, reply, 'chat', engine => call => engine.chat(call)))
  app.post('/v1/completions', (request, reply) => serve(serving, request, reply, 'text_completion', only('completions')))
  app.post('/v1/responses', (request, reply) => serve(serving, request, reply, 'responses', only('responses')))
  app.get('/v1/models', async () => {
    const { limits, model } = state.health.control()
    const room = limits === undefined ? {} : { max_model_len: limits.tokens, epd: { max_messages: limits.messages, max_characters: limits.characters } }
    const entry = { id: model.name, object: 'model', created: CREATED, owned_by: 'fastify-epd', root: model.name, parent: null, permission: [], ...room }
    return { object: 'list', data: [entry] }
  })
}

/** A route that encoders do not have. */
function only (method: 'completions' | 'responses'): (engine: EngineService) => Serve {
  return engine => call => engine[method]?.(call) ?? Promise.reject(new EngineError('unsupported', `An engine with role ${engine.role} does not serve /v1/${method}.`))
}

async function serve ({ state, unreadTimeoutMs }: { state: ServerState, unreadTimeoutMs: number }, request: FastifyRequest, reply: FastifyReply, operation: string, of: (engine: EngineService) => Serve): Promise<FastifyReply> {
  const startedAt = performance.now()
  const engine = state.health.serving()
  const body = bodyOf(request.body, engine)
  const run = of(engine)
  const callerId = callerIdOf(request)
  const ahead = headerOf(request, AHEAD_HEADER) !== undefined
  const consumer = headerOf(request, CONSUMER_HEADER)
  // The gateway sends again when a connection breaks: it has not read the first answer.
  if (headerOf(request, AGAIN_HEADER) !== undefined) for (const id of [callerId, ...state.inFlight.abort(callerId)]) engine.abort(id)
  // The request itself comes under the id.
  const flight = state.inFlight.start(ahead ? randomUUID() : callerId)
  abortWhenClientGone(reply, flight)
  closeWhenAborted(reply, flight)
  reply.header(REQUEST_ID_HEADER, flight.requestId)
  const context = contextOf(request.headers)
  const ended = (): void => {
    if (!ahead) state.metrics?.observeRequest(operation, (performance.now() - startedAt) / 1_000, context)
    flight.end()
  }
  try {
    const answer = await run({
      body,
      signal: flight.signal,
      requestId: ahead ? callerId : flight.requestId,
      tenant: textOf(body[TENANT_FIELD]),
      consumer: consumer && (state.names.get(consumer) ?? consumer),
      overlap: headerOf(request, OVERLAP_HEADER),
      ahead,
      context
    })
    return sendAnswer(reply, answer, { flight, unreadTimeoutMs, ended })
  } catch (err) {
    ended()
    throw err
  }
}

function bodyOf (body: unknown, engine: EngineService): Json {
  if (!isObject(body)) throw new EngineError('invalid_request', 'The body must be a JSON object.')
  const { model, [TENANT_FIELD]: tenant } = body
  if (model !== undefined && typeof model !== 'string') throw new EngineError('invalid_request', 'model must be a string.', { param: 'model' })
  if (tenant !== undefined && typeof tenant !== 'string') throw new EngineError('invalid_request', `${TENANT_FIELD} must be a string.`, { param: TENANT_FIELD })
  if (model !== undefined && model !== engine.model.name) {
    throw new EngineError('model_not_found', `The model '${model.slice(0, 200)}' does not exist; this engine serves '${engine.model.name}'.`, { param: 'model' })
  }
  return body
}

/** The id goes into logs and headers, so one that is no plain token is replaced. */
function callerIdOf (request: FastifyRequest): string {
  const id = headerOf(request, REQUEST_ID_HEADER)
  return id !== undefined && REQUEST_ID.test(id) ? id : randomUUID()
}

function headerOf (request: FastifyRequest, name: string): string | undefined {
  const value = request.headers[name]
  return typeof value === 'string' && value !== '' ? value : undefined
}

/**
 * Aborts the flight when the client goes away: the response closes before it has ended. Fastify's own `request.signal`
 * (and Node's) aborts as soon as the body of a POST is read (fastify#6725, nodejs/node#63532).
 */
function abortWhenClientGone (reply: FastifyReply, flight: Flight): void {
  const { raw } = reply
  const check = (): void => {
    if (!raw.writableEnded) flight.abort(new EngineError('cancelled', 'The client closed the connection.'))
  }
  if (raw.destroyed) check()
  else raw.once('close', check)
}

/** An aborted request ends with an error, which a client that does not read never takes: then its connection is closed. */
function closeWhenAborted ({ raw }: FastifyReply, { signal }: Flight): void {
  signal.addEventListener('abort', () => {
    const timer = setTimeout(() => { raw.destroy() }, ABORTED_GRACE_MS)
    raw.once('close', () => { clearTimeout(timer) })
  }, { once: true })
}

interface Delivery {
  readonly flight: Flight
  readonly unreadTimeoutMs: number
  /** Called once, when nothing more will be sent. */
  readonly ended: () => void
}

/**
 * Sends an engine's answer. A slow client stops the stream's iterator, which is aborted when it takes too long; a client
 * that has gone ends it by its `return`.
 */
function sendAnswer (reply: FastifyReply, answer: ChatAnswer, delivery: Delivery): FastifyReply {
  reply.code(answer.status)
  if (answer.headers !== undefined) reply.headers(answer.headers)
  if ('json' in answer) {
    delivery.ended()
    return reply.send(answer.json)
  }
  reply.headers({ 'content-type': 'text/event-stream; charset=utf-8', 'cache-control': 'no-cache', 'x-accel-buffering': 'no' })
  return reply.send(Readable.from(events(answer.stream, reply, delivery), { objectMode: false }))
}

async function * events (stream: AsyncIterable<Buffer>, reply: FastifyReply, { flight, unreadTimeoutMs, ended }: Delivery): AsyncGenerator<Buffer> {
  const unread = (): void => { flight.abort(new EngineError('cancelled', `The client has read nothing for ${unreadTimeoutMs / 1000} s.`)) }
  let timer: NodeJS.Timeout | undefined
  try {
    for await (const bytes of stream) {
      timer = setTimeout(unread, unreadTimeoutMs)
      yield bytes
      clearTimeout(timer)
    }
  } catch (err) {
    // The head is sent, so the stream carries the error. A client that caused it by leaving does not read it.
    if (!EngineError.is(err)) reply.log.error({ err }, 'stream failed')
    yield errorEvent(err)
  } finally {
    clearTimeout(timer)
    ended()
  }
}
