/**
 * A gateway that existed before: bearer authentication, a rate limit, and its own /v1/chat/completions to an upstream.
 * One `register` gives it EPD: picture questions for models that EPD nodes serve are routed E -> PD; everything else
 * goes to the upstream as before. Authentication and limits go on applying to both.
 */
import bearerAuth from '@fastify/bearer-auth'
import rateLimit from '@fastify/rate-limit'
import replyFrom from '@fastify/reply-from'
import epd, { type EpdOptions } from 'fastify-epd'
import Fastify, { type FastifyInstance } from 'fastify'

export interface GatewaySettings {
  readonly upstream: string
  readonly keys: string[]
  readonly requestsPerMinute: number
  readonly epd: EpdOptions
}

export async function buildGateway (settings: GatewaySettings): Promise<FastifyInstance> {
  const app = Fastify({ bodyLimit: 32 * 1024 * 1024 })
  await app.register(rateLimit, { max: settings.requestsPerMinute, timeWindow: '1 minute' })
  await app.register(replyFrom, { base: settings.upstream })

  // The one line that is new.
  await app.register(epd, { ...settings.epd, attach: ['/v1/chat/completions'] })

  await app.register(async api => {
    await api.register(bearerAuth, { keys: settings.keys })
    api.post('/v1/chat/completions', (request, reply) => reply.from('/v1/chat/completions'))
    api.get('/v1/models', (request, reply) => reply.from('/v1/models'))
  })
  return app
}
