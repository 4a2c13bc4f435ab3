/** `/instances` as vLLM's disagg_epd_proxy.py has it with --dynamic-registration, so that its launch scripts work unchanged. */
import { timingSafeEqual } from 'node:crypto'
import type { FastifyError, FastifyPluginAsync, FastifyReply, onRequestHookHandler } from 'fastify'
import type { Role } from '../../../adapters/adapter.ts'
import type { Gateway } from '../../gateway.ts'
import { digest, requireOperator } from './guard.ts'

const ROLES = { encode: 'encoder', prefill: 'prefill', decode: 'decode', prefill_decode: 'hybrid' } as const satisfies Record<string, Role>

type InstanceRole = keyof typeof ROLES

interface Instance {
  readonly role: InstanceRole
  readonly url: string
  readonly ec_zmq_addrs?: readonly string[]
  readonly dp_size?: number
}

const url = { type: 'string', pattern: '^https?://[^\\s/?#]+[^\\s?#]*$', maxLength: 2_048 } as const

const instance = {
  type: 'object',
  required: ['role', 'url'],
  properties: {
    role: { enum: Object.keys(ROLES) },
    url,
    ec_zmq_addrs: { type: 'array', maxItems: 1_024, items: { type: 'string', pattern: '^tcp://[^\\s/]+:[0-9]+$', maxLength: 2_048 } },
    dp_size: { type: 'integer', minimum: 1 }
  }
} as const

export const instanceRoutes: FastifyPluginAsync<{ readonly gateway: Gateway }> = async function instanceRoutes (app, { gateway }) {
  const { registry } = gateway
  app.setErrorHandler<FastifyError>((error, request, reply) => {
    const status = error.validation === undefined ? error.statusCode ?? 500 : 422
    if (status >= 500) request.log.error({ err: error }, 'route failed')
    return refuse(reply, status, status >= 500 ? 'Internal Server Error' : error.message)
  })
  app.addHook('onRequest', requireApiKey(gateway))
  // As in nodes.ts: a page of another site can't post JSON.
  app.removeContentTypeParser('text/plain')

  app.get('/instances', async () => {
    const { nodes } = registry.snapshot()
    return Object.fromEntries(Object.entries(ROLES).map(([name, role]) => {
      const served = nodes.filter(node => node.role === role)
      const live = served.filter(node => node.state === 'healthy')
      return [name, { live: live.map(node => node.id), evicted: served.filter(node => !live.includes(node)).map(node => node.id) }]
    }))
  })

  app.post<{ Body: Instance }>('/instances', { schema: { body: instance } }, async (request, reply) => {
    const { role, ec_zmq_addrs: addresses = [], dp_size: replicas = 1 } = request.body
    const id = bare(request.body.url)
    if (addresses.length > 0 && role !== 'prefill' && role !== 'prefill_decode') return refuse(reply, 400, 'Only EC consumers accept Mooncake addresses')
    if (addresses.length > 0 && addresses.length !== replicas) return refuse(reply, 422, 'ec_zmq_addrs must contain one address per DP replica')
    const known = registry.get(id)
    if (known !== undefined && known.role !== ROLES[role]) return refuse(reply, 409, 'Unregister the instance before changing its role')
    registry.add({ url: id, role: ROLES[role], adapter: 'vllm', ...(addresses.length === 0 ? {} : { ecZmqAddrs: addresses }) }, { peer: request.ip })
    return { registered: known === undefined }
  })

  app.delete<{ Querystring: { url: string } }>('/instances', { schema: { querystring: { type: 'object', required: ['url'], properties: { url } } } },
    async request => ({ removed: registry.remove(bare(request.query.url)) }))
}

/** The proxy knows an instance by its URL without a slash at the end. */
function bare (url: string): string {
  return url.replace(/\/+$/, '')
}

/** FastAPI's shape of an error. */
function refuse (reply: FastifyReply, status: number, detail: string): FastifyReply {
  return reply.code(status).send({ detail })
}

/** `X-API-Key` is the admin key; without the header an operator's other ways in hold. */
function requireApiKey (gateway: Gateway): onRequestHookHandler {
  const operator = requireOperator(gateway)
  return function check (request, reply, done) {
    const key = request.headers['x-api-key']
    const { adminKey } = gateway.options
    if (key === undefined) { operator.call(this, request, reply, done); return }
    if (typeof key === 'string' && adminKey !== undefined && timingSafeEqual(digest(adminKey), digest(key))) { done(); return }
    reply.code(403).send({ detail: 'Invalid admin API key' })
  }
}
