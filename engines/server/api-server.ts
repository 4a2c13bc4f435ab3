import type { AddressInfo } from 'node:net'
import Fastify, { LogController, type FastifyError, type FastifyInstance, type FastifyServerOptions } from 'fastify'
import { ROLE_TO_WIRE } from '../../adapters/wire/roles.ts'
import type { EngineLog, EngineService } from '../service/engine-service.ts'
import { EngineError, errorBody, type EngineErrorCode } from '../service/errors.ts'
import { bearerAuth } from './auth.ts'
import { Health } from './health.ts'
import { InFlight } from './in-flight.ts'
import { engineMetrics } from './metrics.ts'
import { startRegistration, type Registration, type RegistrationOptions } from './registration.ts'
import { distserveRoutes } from './routes-distserve.ts'
import { openaiRoutes } from './routes-openai.ts'
import { opsRoutes } from './routes-ops.ts'
import type { ServerState } from './state.ts'
import { startEngineTelemetry, type EngineTelemetry } from './telemetry.ts'

export interface ApiServerOptions {
  /** Makes the engine. Called once, with the server's own URL: the engine's id. */
  readonly createEngine: (url: string, log: EngineLog) => Promise<EngineService>
  /** @default '127.0.0.1' */
  readonly host?: string
  /** 0 takes a free one. @default 0 */
  readonly port?: number
  /** URL that others reach this server by, when it is not `http://host:port`. */
  readonly publicUrl?: string | undefined
  /** Gateway to register with and to send spans to. */
  readonly proxyUrl?: string | undefined
  /** Asked for as bearer token on every route but /health. */
  readonly apiKey?: string | undefined
  /** Bytes. @default 64 MiB */
  readonly bodyLimit?: number | undefined
  readonly version: string
  /** Fastify's logger options. @default no log */
  readonly logger?: FastifyServerOptions['logger']
  /** Times of the registration, for tests. */
  readonly registration?: Pick<RegistrationOptions, 'firstPauseMs' | 'longestPauseMs' | 'repeatMs'>
}

export interface ApiServer {
  /** Own URL, which is the engine id. */
  readonly url: string
  readonly engine: EngineService
  readonly log: EngineLog
  /**
   * Refuses new requests, lets those in flight finish for at most `graceMs`, aborts the rest, then ends everything.
   * Idempotent: a second call waits for the first.
   */
  close (graceMs?: number): Promise<void>
}

const DEFAULT_BODY_LIMIT = 64 * 1024 * 1024
/** Peers that are about to pull get this long; a lease whose consumer has died would hold us for its whole term. */
const LEASE_GRACE_MS = 2_000
/** What was aborted gets this long to end cleanly. */
const ABORT_GRACE_MS = 1_000

/**
 * Serves an engine as LMDeploy's api_server does. It listens before the engine exists, as the engine's id is the URL;
 * /health says `initialising` meanwhile. Resolves when the engine is ready.
 *
 * @throws whatever `createEngine` or the engine's `ready` rejects with; the server is closed then
 */
export async function startApiServer (options: ApiServerOptions): Promise<ApiServer> {
  const state: ServerState = { health: new Health(), inFlight: new InFlight(), metrics: undefined, url: '' }
  const app = buildApp(options, state)
  await app.listen({ host: options.host ?? '127.0.0.1', port: options.port ?? 0 })
  state.url = options.publicUrl ?? urlOf(app)
  let engine: EngineService | undefined
  try {
    engine = await options.createEngine(state.url, app.log)
    state.health.started(engine)
    state.metrics = engineMetrics(engine)
    await engine.ready
  } catch (err) {
    await engine?.close().catch(() => {})
    await app.close()
    throw err
  }
  state.health.ready()
  return serving(app, state, engine, options)
}

function serving (app: FastifyInstance, state: ServerState, engine: EngineService, options: ApiServerOptions): ApiServer {
  const registration = register(app, state, engine, options)
  const telemetry = startEngineTelemetry({
    engineId: state.url,
    role: engine.role,
    version: options.version,
    proxyUrl: options.proxyUrl,
    token: () => registration?.token(),
    onRefused: () => { registration?.again() },
    onProblem: message => { app.log.warn(message) }
  })
  let closing: Promise<void> | undefined
  return {
    url: state.url,
    engine,
    log: app.log,
    close (graceMs = 0) {
      closing ??= end({ app, state, engine, registration, telemetry }, graceMs)
      return closing
    }
  }
}

function register (app: FastifyInstance, state: ServerState, engine: EngineService, options: ApiServerOptions): Registration | undefined {
  if (options.proxyUrl === undefined) return undefined
  return startRegistration({
    proxyUrl: options.proxyUrl,
    url: state.url,
    role: ROLE_TO_WIRE[engine.role],
    models: [engine.model.name],
    log: app.log,
    ...options.registration
  })
}

interface Parts {
  readonly app: FastifyInstance
  readonly state: ServerState
  readonly engine: EngineService
  readonly registration: Registration | undefined
  readonly telemetry: EngineTelemetry | undefined
}

async function end ({ app, state, engine, registration, telemetry }: Parts, graceMs: number): Promise<void> {
  const until = performance.now() + graceMs
  state.health.drain()
  await registration?.close()
  if (!await state.inFlight.idle(graceMs)) {
    state.inFlight.abortAll()
    await state.inFlight.idle(ABORT_GRACE_MS)
  }
  await leasesEnded(engine, Math.min(until, performance.now() + LEASE_GRACE_MS))
  await engine.close()
  await app.close()
  await telemetry?.close()
}

async function leasesEnded (engine: EngineService, until: number): Promise<void> {
  while ((engine.gauges().epd_leases_open ?? 0) > 0 && performance.now() < until) {
    await new Promise(resolve => setTimeout(resolve, 20))
  }
}

function buildApp (options: ApiServerOptions, state: ServerState): FastifyInstance {
  const app = Fastify({
    logger: options.logger ?? false,
    bodyLimit: options.bodyLimit ?? DEFAULT_BODY_LIMIT,
    // A line for each request would cost as much as serving it.
    logController: new LogController({ disableRequestLogging: true }),
    // A draining engine answers in its own words (health, draining) until it closes.
    return503OnClosing: false
  })
  app.setErrorHandler<FastifyError>((err, request, reply) => {
    const known = EngineError.is(err) ? err : fromFastify(err)
    if (known === undefined) request.log.error({ err }, 'request failed')
    if (known?.retryAfter !== undefined) reply.header('retry-after', known.retryAfter)
    return reply.code(known?.status ?? 500).send(errorBody(known ?? err))
  })
  app.setNotFoundHandler(request => {
    throw new EngineError('not_found', `No route ${request.method} ${request.url.split('?', 1)[0]!.slice(0, 200)}.`)
  })
  if (options.apiKey !== undefined) app.addHook('onRequest', bearerAuth(options.apiKey))
  openaiRoutes(app, state)
  opsRoutes(app, state)
  distserveRoutes(app, state)
  return app
}

/** What Fastify itself finds wrong with a request: JSON, size, content type. */
function fromFastify (err: FastifyError): EngineError | undefined {
  const status = err.statusCode ?? 500
  if (status >= 500) return undefined
  const code: EngineErrorCode = status === 413 ? 'request_too_large' : 'invalid_request'
  return new EngineError(code, err.message, { cause: err })
}

function urlOf (app: FastifyInstance): string {
  const { address, port, family } = app.server.address() as AddressInfo
  return `http://${family === 'IPv6' ? `[${address}]` : address}:${port}`
}
