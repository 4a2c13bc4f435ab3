import type { FastifyInstance, onRequestHookHandler } from 'fastify'
import { CONNECTION_STATUS, MIGRATION_PROTOCOL, type P2PEndpoints, type P2PRefusal } from '../../adapters/wire/distserve.ts'
import { isObject, objectOf, type Json } from '../../adapters/wire/json.ts'
import type { EngineService } from '../service/engine-service.ts'
import { EngineError } from '../service/errors.ts'
import { parseEndpoint } from '../p2p/endpoint.ts'
import { P2PError } from '../p2p/types.ts'
import type { ServerState } from './state.ts'

const CONNECT_TIMEOUT_MS = 10_000

/** GET /health, GET /metrics, POST /abort_request. */
export function controlRoutes (app: FastifyInstance, state: ServerState, operator: onRequestHookHandler): void {
  const { health } = state
  app.get('/health', async (_request, reply) => {
    return reply.code(health.status === 'healthy' ? 200 : 503).send({ status: health.status, message: health.message })
  })
  app.get('/metrics', async ({ headers: { accept } }, reply) => {
    if (state.metrics === undefined) throw new EngineError('initialising', health.message)
    const { contentType, text } = state.metrics.read(accept)
    return reply.type(contentType).header('vary', 'accept').send(text)
  })
  app.post('/abort_request', { onRequest: operator }, async request => ({ status: 'SUCCESS', aborted: abort(state, objectOf(request.body)) }))
}

/** LMDeploy's shape plus `request_id`. Returns how many requests were found. */
function abort ({ health, inFlight }: ServerState, { abort_all: all, request_id: requestId, session_id: sessionId }: Json): number {
  const engine = health.control()
  if (all === true) return inFlight.abortAll().length
  if (typeof requestId === 'string' && requestId !== '') {
    const ids = inFlight.abort(requestId)
    // For a request that was answered, the engine may still hold leases that the gateway has not read.
    const held = [...new Set([requestId, ...ids])].filter(id => engine.abort(id))
    if (ids.length === 0 && held.length === 0) inFlight.expect(requestId)
    return ids.length
  }
  if (Number.isSafeInteger(sessionId)) return engine.abortSession?.(sessionId as number) === true ? 1 : 0
  throw new EngineError('invalid_request', 'Send request_id (a string), session_id (an integer) or abort_all: true.')
}

/**
 * LMDeploy's control routes between engines, in its shapes. As in LMDeploy, a pair that can't work together is answered
 * with 200 and `status: 2`; `message` has the reason. Only a body of another shape is a 400.
 */
export function distserveRoutes (app: FastifyInstance, { health, names }: ServerState, onRequest: onRequestHookHandler): void {
  app.get('/distserve/engine_info', { onRequest }, async () => health.control().info())
  app.post('/distserve/p2p_initialize', { onRequest }, async request => initialize(health.control(), bodyOf(request.body)))
  app.post('/distserve/p2p_connect', { onRequest }, async request => {
    const { traceparent } = request.headers
    return await connect(health.control(), bodyOf(request.body), names, typeof traceparent === 'string' ? traceparent : undefined)
  })
  app.post('/distserve/p2p_drop_connect', { onRequest }, async request => {
    const remote = requiredText(bodyOf(request.body), 'remote_engine_id')
    await health.control().p2p.drop(names.get(remote) ?? remote)
    names.delete(remote)
    return { success: true }
  })
  app.post('/distserve/free_cache', { onRequest }, async request => {
    health.control().endSession(leaseOf(bodyOf(request.body)))
    return { status: 'SUCCESS' }
  })
  app.post('/distserve/clear_cache', { onRequest }, async () => {
    health.control().clearCache()
    return { status: 'SUCCESS' }
  })
}

function initialize (engine: EngineService, body: Json): P2PEndpoints | P2PRefusal {
  requiredText(body, 'remote_engine_id')
  const refusal = protocolRefusal(body.protocol) ?? modelRefusal(engine, body.remote_engine_config)
  if (refusal !== undefined) return refusal
  const { endpoint } = engine.p2p
  return {
    status: CONNECTION_STATUS.success,
    engine_endpoint_info: { zmq_address: (endpoint as { tcp?: string }).tcp ?? '' },
    kvtransfer_endpoint_info: [{ protocol: MIGRATION_PROTOCOL.tcp, endpoint_info: JSON.stringify(endpoint) }]
  }
}

/** Links and warms up: the engine's `connect` exchanges a message with the peer before it returns. */
async function connect (engine: EngineService, body: Json, names: Map<string, string>, traceparent: string | undefined): Promise<object> {
  const remoteId = requiredText(body, 'remote_engine_id')
  const refusal = protocolRefusal(body.protocol)
  if (refusal !== undefined) return refusal
  const info = endpointInfoOf(body)
  try {
    const endpoint = parseEndpoint(info)
    // Before the handshake: a drop that comes meanwhile is to find the peer.
    if (endpoint.engine !== remoteId) names.set(remoteId, endpoint.engine)
    await engine.p2p.connect(endpoint, { signal: AbortSignal.timeout(CONNECT_TIMEOUT_MS), traceparent })
    return { status: CONNECTION_STATUS.success }
  } catch (err) {
    if (err instanceof P2PError) return refuse(err.message, err.code)
    throw err
  }
}

function refuse (message: string, code = 'REFUSED'): P2PRefusal {
  return { status: CONNECTION_STATUS.fail, code, message }
}

function protocolRefusal (protocol: unknown): P2PRefusal | undefined {
  if (protocol === undefined || protocol === null || protocol === MIGRATION_PROTOCOL.tcp) return undefined
  return refuse(`migration protocol ${String(protocol)} is not supported; this engine speaks 1 (TCP, by ZeroMQ)`)
}

/** Checks a peer that answers its fingerprint; p2p_connect checks the endpoint infos again. */
function modelRefusal (engine: EngineService, config: unknown): P2PRefusal | undefined {
  const { fingerprint, model } = objectOf(config)
  if (typeof fingerprint !== 'string' || fingerprint === engine.model.fingerprint) return undefined
  return refuse(`the engines run different models: '${engine.model.name}' here, '${String(model)}' there (fingerprints differ)`)
}

/** One entry for each rank; ours have one. */
function endpointInfoOf (body: Json): string {
  const list = body.remote_kvtransfer_endpoint_info
  if (!Array.isArray(list) || list.length === 0) throw missing('remote_kvtransfer_endpoint_info', 'a list with one entry per rank')
  const { endpoint_info: info } = objectOf(list[0])
  if (typeof info === 'string') return info
  throw missing('remote_kvtransfer_endpoint_info[0].endpoint_info', 'a string')
}

/** The lease rather than the session, when both are named: it is this process's for certain. */
function leaseOf (body: Json): number | string {
  const { remote_session_id: session, lease } = body
  if (typeof lease === 'string' && lease !== '') return lease
  if (Number.isSafeInteger(session)) return session as number
  throw missing('remote_session_id', 'an integer (or send lease, a string)')
}

function bodyOf (body: unknown): Json {
  if (isObject(body)) return body
  throw new EngineError('invalid_request', 'The body must be a JSON object.')
}

function requiredText (body: Json, name: string): string {
  const value = body[name]
  if (typeof value === 'string' && value !== '') return value
  throw missing(name, 'a string')
}

function missing (name: string, what: string): EngineError {
  return new EngineError('invalid_request', `${name} must be ${what}.`, { param: name })
}
