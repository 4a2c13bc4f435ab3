import type { FastifyPluginAsync, RouteHandlerMethod } from 'fastify'
import type { EmbeddedHandle } from '../../embedded/index.ts'
import type { Gateway } from '../../gateway.ts'
import { readinessOf } from '../../registry/readiness.ts'
import type { MetricsPage } from '../../telemetry/prometheus.ts'

export interface OpsRoutesOptions {
  readonly gateway: Gateway
  readonly health: boolean
  readonly embedded: EmbeddedHandle | undefined
  /** Undefined: no GET /metrics. */
  readonly metrics: MetricsPage | undefined
}

/** GET /livez, /readyz, /health and /metrics. */
export const opsRoutes: FastifyPluginAsync<OpsRoutesOptions> = async function opsRoutes (app, { gateway, health, embedded, metrics }) {
  const unlessThere = (url: string, handler: RouteHandlerMethod): void => {
    if (!app.hasRoute({ method: 'GET', url: app.prefix + url })) app.get(url, { logLevel: 'warn' }, handler)
  }
  if (health) {
    unlessThere('/health', async (_request, reply) => {
      const { health: state } = gateway
      return reply.code(state.status === 'healthy' ? 200 : 503).send(state)
    })
    // Also while it drains: a probe that fails here gets the process killed, and requests in flight with it.
    unlessThere('/livez', async () => ({ status: 'live' }))
    unlessThere('/readyz', async (request, reply) => {
      const { model } = request.query as { model?: string | string[] }
      const { ready, why, models } = readinessOf(gateway.registry.snapshot(), Array.isArray(model) ? model[0] : model, embedded?.problem())
      const status = gateway.draining ? 'draining' : ready ? 'ready' : 'not_ready'
      return reply.code(status === 'ready' ? 200 : 503).send({ status, ...(why === undefined ? {} : { why }), models })
    })
  }
  if (metrics !== undefined) {
    unlessThere('/metrics', async ({ headers: { accept } }, reply) => {
      const { contentType, text } = metrics.read(accept)
      return reply.type(contentType).header('vary', 'accept').send(text)
    })
  }
}
