/** `GET /v1/models`: what the nodes serve, and aliases. */
import type { FastifyInstance, FastifyRequest, onRequestHookHandler } from 'fastify'
import { epdError } from '../../errors.ts'
import type { Gateway } from '../../gateway.ts'
import { modelFor, servedNames } from '../aliases.ts'
import { kHolder, type Held } from '../handle.ts'

const STARTED = Math.floor(Date.now() / 1_000)

export function modelRoutes (app: FastifyInstance, gateway: Gateway): void {
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
