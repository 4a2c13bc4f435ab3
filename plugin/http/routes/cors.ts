import type { FastifyInstance, FastifyRequest } from 'fastify'
import { BESIDE_V1 } from './other.ts'

const MAX_AGE_SECONDS = 600

/**
 * Lets pages of these origins use the routes of this scope (CORS). Call it before any hook that asks for a key: a
 * browser asks first, and has no key then. Credentials of the browser are not let through: keys are bearer tokens.
 */
export function allowOrigins (app: FastifyInstance, origins: readonly string[]): void {
  const any = origins.includes('*')
  app.addHook('onRequest', async (request, reply) => {
    const { origin } = request.headers
    if (!any) reply.header('vary', 'Origin')
    if (origin === undefined || !(any || origins.includes(origin))) return
    reply.header('access-control-allow-origin', any ? '*' : origin)
    if (!asksFirst(request)) {
      reply.header('access-control-expose-headers', '*')
      return
    }
    reply.headers({ 'access-control-allow-methods': 'GET, POST, DELETE', 'access-control-max-age': String(MAX_AGE_SECONDS) })
    const wanted = request.headers['access-control-request-headers']
    if (wanted !== undefined) reply.header('access-control-allow-headers', wanted)
    return reply.code(204).send()
  })
  for (const url of ['/v1/*', ...BESIDE_V1]) app.options(url, async (_request, reply) => reply.code(204).send())
}

function asksFirst ({ method, headers }: FastifyRequest): boolean {
  return method === 'OPTIONS' && headers['access-control-request-method'] !== undefined
}
