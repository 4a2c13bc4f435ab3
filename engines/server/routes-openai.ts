import { randomUUID } from 'node:crypto'
import type { FastifyInstance, FastifyReply, FastifyRequest } from 'fastify'
import { AGAIN_HEADER, CONSUMER_HEADER, REQUEST_ID_HEADER } from '../../adapters/wire/headers.ts'
import { isObject, textOf, type Json } from '../../adapters/wire/json.ts'
import { TENANT_FIELD } from '../../adapters/wire/results.ts'
import type { ChatAnswer, ChatCall, EngineService } from '../service/engine-service.ts'
import { EngineError } from '../service/errors.ts'
import { abortWhenClientGone, sendAnswer } from './answer.ts'
import type { ServerState } from './state.ts'
import { contextOf } from './telemetry.ts'

const REQUEST_ID = /^[\x21-\x7e]{1,128}$/
const CREATED = Math.floor(Date.now() / 1_000)

type Serve = (call: ChatCall) => Promise<ChatAnswer>

/** POST /v1/chat/completions and /v1/completions, GET /v1/models. */
export function openaiRoutes (app: FastifyInstance, state: ServerState): void {
  app.post('/v1/chat/completions', (request, reply) => serve(state, request, reply, 'chat', engine => call => engine.chat(call)))
  app.post('/v1/completions', (request, reply) => serve(state, request, reply, 'text_completion', completionsOf))
  app.get('/v1/models', async () => {
    const { model } = state.health.control()
    const entry = { id: model.name, object: 'model', created: CREATED, owned_by: 'fastify-epd', root: model.name, parent: null, permission: [] }
    return { object: 'list', data: [entry] }
  })
}

function completionsOf (engine: EngineService): Serve {
  if (engine.completions === undefined) throw new EngineError('unsupported', `An engine with role ${engine.role} does not serve /v1/completions.`)
  return call => engine.completions!(call)
}

async function serve (state: ServerState, request: FastifyRequest, reply: FastifyReply, operation: string, of: (engine: EngineService) => Serve): Promise<FastifyReply> {
  const startedAt = performance.now()
  const engine = state.health.serving()
  const body = bodyOf(request.body, engine)
  const run = of(engine)
  const callerId = callerIdOf(request)
  // Sent again because a connection broke: nobody has read what the first one was answered.
  if (headerOf(request, AGAIN_HEADER) !== undefined) for (const id of [callerId, ...state.inFlight.abort(callerId)]) engine.abort(id)
  const flight = state.inFlight.start(callerId)
  abortWhenClientGone(reply, flight)
  reply.header(REQUEST_ID_HEADER, flight.requestId)
  const ended = (): void => {
    state.metrics?.observeRequest(operation, (performance.now() - startedAt) / 1_000)
    flight.end()
  }
  try {
    const answer = await run({
      body,
      signal: flight.signal,
      requestId: flight.requestId,
      tenant: textOf(body[TENANT_FIELD]),
      consumer: headerOf(request, CONSUMER_HEADER),
      context: contextOf(request.headers)
    })
    return sendAnswer(reply, answer, ended)
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

/** An id that is no plain token is replaced: it goes into logs and headers. */
function callerIdOf (request: FastifyRequest): string {
  const id = headerOf(request, REQUEST_ID_HEADER)
  return id !== undefined && REQUEST_ID.test(id) ? id : randomUUID()
}

function headerOf (request: FastifyRequest, name: string): string | undefined {
  const value = request.headers[name]
  return typeof value === 'string' && value !== '' ? value : undefined
}
