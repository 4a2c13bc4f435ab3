import type { FastifyPluginAsync } from 'fastify'
import type { Gateway } from '../../gateway.ts'
import type { Prometheus } from '../../telemetry/prometheus.ts'

export interface OpsRoutesOptions {
  readonly gateway: Gateway
  readonly health: boolean
  /** Undefined: no GET /metrics. */
  readonly metrics: Prometheus | undefined
}

/** GET /health and GET /metrics. */
export const opsRoutes: FastifyPluginAsync<OpsRoutesOptions> = async function opsRoutes (app, { gateway, health, metrics }) {
  if (health && !app.hasRoute({ method: 'GET', url: app.prefix + '/health' })) {
    app.get('/health', { logLevel: 'warn' }, async (_request, reply) => {
      const { health: state } = gateway
      return reply.code(state.status === 'healthy' ? 200 : 503).send(state)
    })
  }
  if (metrics !== undefined && !app.hasRoute({ method: 'GET', url: app.prefix + '/metrics' })) {
    app.get('/metrics', { logLevel: 'warn' }, async (_request, reply) =>
      reply.type(metrics.contentType).send(await metrics.text()))
  }
}
