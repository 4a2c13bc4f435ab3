import type { FastifyInstance } from 'fastify'
import { EngineError } from '../service/errors.ts'
import type { ServerState } from './state.ts'

interface AbortBody { request_id?: unknown, session_id?: unknown, abort_all?: unknown }

/** GET /health, GET /metrics, POST /abort_request. */
export function opsRoutes (app: FastifyInstance, state: ServerState): void {
  const { health, inFlight } = state
  app.get('/health', async (_request, reply) => {
    return reply.code(health.status === 'healthy' ? 200 : 503).send({ status: health.status, message: health.message })
  })
  app.get('/metrics', async (_request, reply) => {
    if (state.metrics === undefined) throw new EngineError('initialising', health.message)
    return reply.type(state.metrics.contentType).send(await state.metrics.text())
  })
  app.post<{ Body: AbortBody | null }>('/abort_request', async request => {
    return { status: 'SUCCESS', aborted: abort(state, request.body ?? {}) }
  })

  /** LMDeploy's shape plus `request_id`. Returns how many requests were found. */
  function abort ({ health }: ServerState, body: AbortBody): number {
    const engine = health.control()
    if (body.abort_all === true) return inFlight.abortAll().length
    if (typeof body.request_id === 'string' && body.request_id !== '') {
      const ids = inFlight.abort(body.request_id)
      // The engine may still hold something for one that was answered: leases that nobody has read.
      const held = [...new Set([body.request_id, ...ids])].filter(id => engine.abort(id))
      if (ids.length === 0 && held.length === 0) inFlight.expect(body.request_id)
      return ids.length
    }
    if (Number.isSafeInteger(body.session_id)) return engine.abortSession?.(body.session_id as number) === true ? 1 : 0
    throw new EngineError('invalid_request', 'Send request_id (a string), session_id (an integer) or abort_all: true.')
  }
}
