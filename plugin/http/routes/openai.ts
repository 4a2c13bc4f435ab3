import type { FastifyInstance, FastifyPluginAsync, FastifyRequest } from 'fastify'
import type { IncomingMessage } from 'node:http'
import { readBody } from '../../body/index.ts'
import type { Gateway } from '../../gateway.ts'
import { onRouteError } from '../error-answer.ts'
import { CHAT_PATH, kArrivedAt, type Arriving, type Handle } from '../handle.ts'
import type { Tenants } from '../keys/tenants.ts'
import { checkKey } from './guard.ts'
import { modelRoutes } from './models.ts'
import { otherRoutes } from './other.ts'

export interface OpenAiRoutesOptions {
  readonly gateway: Gateway
  readonly handle: Handle
  readonly tenants: Tenants
}

/**
 * The routes of an OpenAI-compatible server. Register it without fastify-plugin: prefix, content type parsers and error
 * shape are meant to stay inside, and the application's own hooks apply.
 */
export const openaiRoutes: FastifyPluginAsync<OpenAiRoutesOptions> = async function openaiRoutes (app, { gateway, handle, tenants }) {
  const { cors, limits } = gateway.options
  keepBytes(app, limits.body)
  app.setErrorHandler(onRouteError)
  if (limits.gzip || limits.zstd) await (await import('./decompress.ts')).acceptCompressed(app, limits)
  if (cors.length > 0) (await import('./cors.ts')).allowOrigins(app, cors)
  app.addHook('onRequest', (request, reply, done) => {
    const { apiKeys, keys } = gateway.options
    if (keys.length > 0) {
      tenants.admit(request, reply).then(() => { done() }, done)
      return
    }
    if (apiKeys.length > 0) checkKey(request, apiKeys)
    done()
  })

  for (const path of [CHAT_PATH, '/v1/completions']) {
    const init = { overrides: { path } }
    app.post(path, (request, reply) => handle(request, reply, init))
  }
  modelRoutes(app, gateway)

  await app.register(otherRoutes, { gateway, handle, below: app.prefix.length })
}

/** Bodies stay bytes: they are scanned, never parsed as a whole. */
function keepBytes (app: FastifyInstance, limit: number): void {
  app.removeAllContentTypeParsers()
  app.addContentTypeParser('application/json', { bodyLimit: limit }, (request: FastifyRequest & Arriving, payload: IncomingMessage) => {
    request[kArrivedAt] = performance.now()
    return readBody(payload, { limit })
  })
}
