import type { AddressInfo } from 'node:net'
import type { FastifyInstance } from 'fastify'
import { otlpConfigured, tracingDisabled, unsupportedExports } from '../../adapters/wire/otel-env.ts'
import { ROLE_TO_WIRE } from '../../adapters/wire/roles.ts'
import type { EngineLog, EngineService } from '../service/engine-service.ts'
import { buildApp, type AppOptions } from './app.ts'
import { InFlight } from './in-flight.ts'
import { engineMetrics } from './metrics.ts'
import type { Registration, RegistrationOptions } from './registration.ts'
import { Health, type ServerState } from './state.ts'
import type { EngineTelemetry } from './telemetry.ts'

export interface ApiServerOptions extends AppOptions {
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
  readonly version: string
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

/** Time for peers that are about to pull. A lease whose consumer has died would otherwise delay the end by its whole term. */
const LEASE_GRACE_MS = 2_000
/** Time for aborted requests to end cleanly. */
const ABORT_GRACE_MS = 1_000

/**
 * Serves an engine as LMDeploy's api_server does. It listens before the engine exists, as the engine's id is the URL;
 * /health says `initialising` meanwhile. Resolves when the engine is ready.
 *
 * @throws whatever `createEngine` or the engine's `ready` rejects with; the server is closed then
 */
export async function startApiServer (options: ApiServerOptions): Promise<ApiServer> {
  const state: ServerState = { health: new Health(), inFlight: new InFlight(), names: new Map(), metrics: undefined, url: '' }
  const app = buildApp(options, state)
  await app.listen({ host: options.host ?? '127.0.0.1', port: options.port ?? 0 })
  state.url = options.publicUrl ?? urlOf(app)
  const outward = await loadOutward(options)
  let engine: EngineService | undefined
  try {
    engine = await options.createEngine(state.url, app.log)
    state.health.started(engine)
    state.metrics = engineMetrics(engine)
    await engine.ready
  } catch (err) {
    state.metrics?.close()
    await engine?.close().catch(() => {})
    await app.close()
    throw err
  }
  state.health.ready()
  return serving(app, state, engine, options, outward)
}

interface Outward {
  readonly registration: typeof import('./registration.ts') | undefined
  readonly telemetry: typeof import('./telemetry.ts') | undefined
}

/** What only engines load that speak to a gateway or to a receiver of spans: an HTTP client and the SDK cost a start 0.3 s of CPU. */
async function loadOutward ({ proxyUrl }: ApiServerOptions): Promise<Outward> {
  const spans = !tracingDisabled() && (proxyUrl !== undefined || otlpConfigured() || unsupportedExports().length > 0)
  return {
    registration: proxyUrl === undefined ? undefined : await import('./registration.ts'),
    telemetry: spans ? await import('./telemetry.ts') : undefined
  }
}

function serving (app: FastifyInstance, state: ServerState, engine: EngineService, options: ApiServerOptions, outward: Outward): ApiServer {
  const registration = register(app, state, engine, options, outward)
  const telemetry = outward.telemetry?.startEngineTelemetry({
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

function register (app: FastifyInstance, state: ServerState, engine: EngineService, options: ApiServerOptions, outward: Outward): Registration | undefined {
  if (options.proxyUrl === undefined) return undefined
  return outward.registration?.startRegistration({
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
  state.metrics?.close()
  await engine.close()
  // Whatever still holds a connection, a body half sent or an answer unread, had its time.
  app.server.closeAllConnections()
  await app.close()
  await telemetry?.close()
}

async function leasesEnded (engine: EngineService, until: number): Promise<void> {
  while ((engine.gauges().epd_leases_open ?? 0) > 0 && performance.now() < until) {
    await new Promise(resolve => setTimeout(resolve, 20))
  }
}

function urlOf (app: FastifyInstance): string {
  const { address, port, family } = app.server.address() as AddressInfo
  return `http://${family === 'IPv6' ? `[${address}]` : address}:${port}`
}
