import type { FastifyInstance, FastifyPluginAsync } from 'fastify'
import fp from 'fastify-plugin'
import { attachRoutes } from './http/attach.ts'
import { embeddedControl, type EmbeddedControl, type EmbeddedHandle } from './embedded/index.ts'
import { AlreadyRegisteredError } from './errors.ts'
import { Gateway } from './gateway.ts'
import { createHandle, type Handle, type RawBodies } from './http/handle.ts'
import { resolveOptions, type EpdOptions } from './options/index.ts'
import type { GatewayParts } from './parts.ts'
import type { RegistryApi } from './registry/index.ts'
import { Tenants } from './http/keys/tenants.ts'
import { requireOperator } from './http/routes/guard.ts'
import { instanceRoutes } from './http/routes/instances.ts'
import { nodeRoutes } from './http/routes/nodes.ts'
import { openaiRoutes } from './http/routes/openai.ts'
import { opsRoutes } from './http/routes/ops.ts'
import { sglangRoutes } from './http/routes/sglang.ts'
import { spanRoutes } from './http/routes/spans.ts'
import { traceRoutes } from './http/routes/traces.ts'
import { uiRoutes } from './http/routes/ui.ts'
import type { MetricsPage } from './telemetry/prometheus.ts'
import { Tracing } from './telemetry/tracing.ts'
import { Thumbnails } from './ui/thumbnails.ts'
import { TraceStore } from './traces/store.ts'

/** What `app.epd` is. */
export interface Epd {
  readonly gateway: Gateway
  /** Answers a request of a handler of yours through EPD, errors included. Never rejects. */
  readonly handle: Handle
  readonly nodes: RegistryApi
  /** Traces kept in memory; undefined when the options turn them off. */
  readonly traces: TraceStore | undefined
  /** The engines started with the application; undefined when there are none. */
  readonly embedded: EmbeddedHandle | undefined
}

declare module 'fastify' {
  interface FastifyInstance {
    epd: Epd
  }
  interface FastifyContextConfig {
    /** Requests of this route with media go through EPD; its own handler serves the others. */
    epd?: boolean
  }
}

const plugin = (parts: GatewayParts): FastifyPluginAsync<EpdOptions> => async function fastifyEpd (app, raw) {
  if (app.hasDecorator('epd')) throw new AlreadyRegisteredError()
  const options = resolveOptions(raw)
  const thumbnails = options.captureContent ? new Thumbnails() : undefined
  const tracing = new Tracing(options.store ?? (options.traces > 0 ? new TraceStore({ maxTraces: options.traces }) : undefined))
  await tracing.start(message => { app.log.warn(message) })
  const gateway = new Gateway({ options, log: app.log, tracing, thumbnails, parts })
  // Loaded only where the route is on: an application with metrics of its own need not pay for these.
  const metrics = options.routes.metrics ? (await import('./telemetry/prometheus.ts')).metricsPage(gateway) : undefined
  const rawBodies: RawBodies = new WeakMap()
  const handle = createHandle(gateway, rawBodies)
  const embedded = options.embedded === undefined ? undefined : embeddedControl({ gateway, log: app.log })
  const epd: Epd = { gateway, handle, nodes: gateway.registry, traces: tracing.store, embedded }

  app.decorate('epd', epd)
  attachRoutes(app, { gateway, handle, rawBodies })
  const tenants = new Tenants(gateway, parts.keys)
  app.addHook('onClose', async () => { await tenants.close() })
  await mountRoutes(app, epd, tenants, metrics)
  lifeCycle(app, gateway, embedded, metrics)
  if (options.discover.length > 0) await discover(app, gateway)
}

/** Loaded only where there is something to discover. */
async function discover (app: FastifyInstance, gateway: Gateway): Promise<void> {
  const { Discovery } = await import('./discovery/index.ts')
  const discovery = await Discovery.start(gateway)
  app.addHook('preClose', async () => { discovery.close() })
}

/** Plain plugins, not fastify-plugin's: prefix, parsers and error shape stay inside, and the application's hooks apply. */
async function mountRoutes (app: FastifyInstance, { gateway, handle, embedded }: Epd, tenants: Tenants, metrics: MetricsPage | undefined): Promise<void> {
  const { prefix, routes, logLevel } = gateway.options
  const mount = { prefix, ...(logLevel === undefined ? {} : { logLevel }) }
  if (routes.health || routes.metrics) await app.register(opsRoutes, { ...mount, gateway, health: routes.health, embedded, metrics })
  if (routes.nodes) await app.register(nodeRoutes, { ...mount, gateway })
  if (routes.sglang) await app.register(sglangRoutes, { ...mount, gateway })
  if (routes.vllm) await app.register(instanceRoutes, { ...mount, gateway })
  if (routes.traces) {
    await app.register(traceRoutes, { ...mount, gateway, guard: requireOperator(gateway) })
    await app.register(spanRoutes, { ...mount, gateway })
  }
  if (gateway.options.ui) await app.register(uiRoutes, { ...mount, gateway })
  if (routes.openai) await app.register(openaiRoutes, { ...mount, gateway, handle, tenants })
}

function lifeCycle (app: FastifyInstance, gateway: Gateway, embedded: EmbeddedControl | undefined, metrics: MetricsPage | undefined): void {
  if (embedded !== undefined) app.addHook('onListen', async () => { embedded.start() })
  // Before the server stops listening, so that streams in flight may finish: it would wait for their connections.
  app.addHook('preClose', async () => { await gateway.drain() })
  app.addHook('onClose', async () => {
    await gateway.drain()
    await embedded?.close()
    await gateway.close()
    metrics?.close()
  })
}

/** The plugin of one of several processes. @internal */
export const epdWith = (parts: GatewayParts): FastifyPluginAsync<EpdOptions> => fp(plugin(parts), { fastify: '5.x', name: 'fastify-epd' })

const epd = epdWith({})

export { epd as default, epd }
/** What `require('fastify-epd')` returns. TypeScript before 5.6 can't parse it, so it is not in the declarations. @internal */
export { epd as 'module.exports' }
export { Gateway, type GatewayInit } from './gateway.ts'
export { ERRORS, type EpdError, type EpdErrorCode } from './errors.ts'
export { OptionsError, optionsSchema, resolveOptions, type EpdOptions, type NodeOptions, type OptionsProblem, type ResolvedOptions } from './options/index.ts'
export type { Handle, HandleOptions, HandleOverrides } from './http/handle.ts'
export type { Deliver, Delivery, GatewayRequest, Served } from './pipeline/index.ts'
export type { Plan, Policy, PolicyRequest, Refusal, RequestView, Topology } from './planning/index.ts'
export type { NodeSnapshot, RegistryApi, RegistrySnapshot } from './registry/index.ts'
export { EpdSpanProcessor } from './traces/store.ts'
export { TraceStore, type TraceStoreOptions } from './traces/store.ts'
export type { EmbeddedHandle } from './embedded/index.ts'
