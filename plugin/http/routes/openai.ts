import type { FastifyInstance, FastifyPluginAsync, FastifyRequest, onRequestHookHandler } from 'fastify'
import type { IncomingMessage } from 'node:http'
import { readBody } from '../../body/index.ts'
import { epdError } from '../../errors.ts'
import type { Gateway } from '../../gateway.ts'
import { modelFor, servedNames } from '../aliases.ts'
import { onRouteError } from '../error-answer.ts'
import { CHAT_PATH, kArrivedAt, kHolder, type Arriving, type Held, type Handle } from '../handle.ts'
import type { Tenants } from '../keys/tenants.ts'
import { checkKey } from './guard.ts'
import { otherRoutes } from './other.ts'

export interface OpenAiRoutesOptions {
  readonly gateway: Gateway
  readonly handle: Handle
  readonly tenants: Tenants
}

const STARTED = Math.floor(Date.now() / 1_000)

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

function modelRoutes (app: FastifyInstance, gateway: Gateway): void {
  // A gateway that has itself for a node, or a ring of them, would show models that no server has.
  const onRequest: onRequestHookHandler = (request, _reply, done) => {
    try {
      gateway.via(request.headers)
      done()
    } catch (err) {
      done(err as Error)
    }
  }
  const modelsFor = (request: FastifyRequest & Held): readonly string[] =>
    servedNames(gateway).filter(id => request[kHolder]?.models?.includes(modelFor(gateway, id) ?? id) !== false)
  const list = (request: FastifyRequest): object => ({ object: 'list', data: modelsFor(request).map(id => cardOf(gateway, id)) })
  app.get('/v1/models', { onRequest }, async request => list(request))
  // Ids have slashes: `org/model`.
  app.get<{ Params: { '*': string } }>('/v1/models/*', { onRequest }, async request => {
    const id = request.params['*']
    if (id === '') return list(request)
    if (!modelsFor(request).includes(id)) throw epdError('EPD_ERR_MODEL_NOT_FOUND', [id], { param: 'model' })
    return cardOf(gateway, id)
  })
}

/** The card of the first healthy node that has one: clients size their context by its `max_model_len`. */
function cardOf (gateway: Gateway, id: string): object {
  const target = modelFor(gateway, id)
  if (target !== undefined && target !== id) return { ...cardOf(gateway, target), id }
  for (const { state, role, info } of gateway.registry.snapshot().nodes) {
    const card = state === 'healthy' && role !== 'encoder' ? info?.cards?.find(card => card.id === id) : undefined
    if (card !== undefined) return card
  }
  return { id, object: 'model', created: STARTED, owned_by: 'fastify-epd', root: id, parent: null, permission: [] }
}
