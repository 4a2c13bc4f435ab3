import type { FastifyInstance, FastifyPluginAsync, FastifyRequest } from 'fastify'
import type { IncomingMessage } from 'node:http'
import { readBody } from '../../body/index.ts'
import { epdError } from '../../errors.ts'
import type { Gateway } from '../../gateway.ts'
import { onRouteError } from '../error-answer.ts'
import { CHAT_PATH, kArrivedAt, upstreamPath, type Arriving, type Handle } from '../handle.ts'
import { forwardBodiless } from './bodiless.ts'
import { requireKey } from './guard.ts'

export interface OpenAiRoutesOptions {
  readonly gateway: Gateway
  readonly handle: Handle
}

const STARTED = Math.floor(Date.now() / 1_000)

/**
 * The routes of an OpenAI-compatible server. Register it without fastify-plugin: prefix, content type parsers and error
 * shape are meant to stay inside, and the application's own hooks apply.
 */
export const openaiRoutes: FastifyPluginAsync<OpenAiRoutesOptions> = async function openaiRoutes (app, { gateway, handle }) {
  const { apiKeys, limits } = gateway.options
  keepBytes(app, limits.body)
  app.setErrorHandler(onRouteError)
  if (apiKeys.length > 0) app.addHook('onRequest', requireKey(apiKeys))

  for (const path of [CHAT_PATH, '/v1/completions']) {
    const init = { overrides: { path } }
    app.post(path, (request, reply) => handle(request, reply, init))
  }
  modelRoutes(app, gateway)

  const below = app.prefix.length
  app.route({
    method: ['GET', 'DELETE'],
    url: '/v1/*',
    handler: async (request, reply) => await forwardBodiless(gateway, request, reply, upstreamPath(request.url.slice(below)))
  })
  app.post('/v1/*', async (request, reply) => await handle(request, reply, { overrides: { path: upstreamPath(request.url.slice(below)) } }))
}

/** Bodies stay bytes: they are scanned, never parsed as a whole. */
function keepBytes (app: FastifyInstance, limit: number): void {
  app.removeAllContentTypeParsers()
  app.addContentTypeParser('application/json', { bodyLimit: limit }, (request: FastifyRequest & Arriving, payload: IncomingMessage) => {
    request[kArrivedAt] = performance.now()
    return readBody(payload, { limit })
  })
}

function modelRoutes (app: FastifyInstance, gateway: Gateway): void {
  const card = (id: string): object => ({ id, object: 'model', created: STARTED, owned_by: 'fastify-epd', root: id, parent: null, permission: [] })
  app.get('/v1/models', async () => ({ object: 'list', data: gateway.registry.snapshot().models.map(card) }))
  // Ids have slashes: `org/model`.
  app.get<{ Params: { '*': string } }>('/v1/models/*', async request => {
    const id = request.params['*']
    if (!gateway.registry.snapshot().models.includes(id)) throw epdError('EPD_ERR_MODEL_NOT_FOUND', [id], { param: 'model' })
    return card(id)
  })
}
