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
      const state = healthOf(gateway)
      return reply.code(state.status === 'healthy' ? 200 : 503).send(state)
    })
  }
  if (metrics !== undefined && !app.hasRoute({ method: 'GET', url: app.prefix + '/metrics' })) {
    app.get('/metrics', { logLevel: 'warn' }, async (_request, reply) =>
      reply.type(metrics.contentType).send(await metrics.text()))
  }
}

export interface Health {
  readonly status: 'healthy' | 'no_healthy_node' | 'draining'
  readonly nodes: { readonly healthy: number, readonly total: number }
  readonly models: readonly string[]
}

/** Ready means: a request would find a node. */
export function healthOf (gateway: Gateway): Health {
  const { nodes, models } = gateway.registry.snapshot()
  const healthy = nodes.filter(node => node.state === 'healthy')
  const ready = models.length > 0 || healthy.some(node => node.role === 'hybrid')
  return { status: gateway.draining ? 'draining' : ready ? 'healthy' : 'no_healthy_node', nodes: { healthy: healthy.length, total: nodes.length }, models }
}
