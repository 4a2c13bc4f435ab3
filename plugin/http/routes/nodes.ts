import type { FastifyPluginAsync, FastifyReply, FastifyRequest } from 'fastify'
import { ROLE_FROM_WIRE } from '../../../adapters/adapter.ts'
import { requestJson } from '../../../adapters/http/json.ts'
import { NODE_TOKEN_HEADER } from '../../../adapters/wire/headers.ts'
import { isObject } from '../../../adapters/wire/json.ts'
import { onRouteError } from '../error-answer.ts'
import { epdError } from '../../errors.ts'
import type { Gateway } from '../../gateway.ts'
import { requireOperator } from './guard.ts'

export interface NodeRoutesOptions {
  readonly gateway: Gateway
  /** What registers here ends with the gateway. */
  readonly transient?: boolean
}

interface NodeBody {
  readonly url: string
  readonly status?: { readonly role?: number, readonly models?: readonly string[], readonly speed?: number | null } | null
}

const nodeBody = {
  type: 'object',
  required: ['url'],
  properties: {
    url: { type: 'string', minLength: 1, maxLength: 2_048 },
    status: {
      type: ['object', 'null'],
      properties: {
        role: { enum: [1, 2, 3, 4] },
        models: { type: 'array', items: { type: 'string' } },
        speed: { type: ['number', 'null'], exclusiveMinimum: 0 }
      }
    }
  }
} as const

/** LMDeploy's Status has more members (unfinished, latency), which this gateway measures itself. */
const KNOWN = { body: ['url', 'status'], status: ['role', 'models', 'speed', 'unfinished', 'latency'] } as const

/** In code: Fastify's Ajv removes what a schema does not allow, or takes no notice of it. */
async function refuseUnknown ({ body }: FastifyRequest): Promise<void> {
  for (const [place, value] of [['body', body], ['status', (body as Partial<NodeBody> | null | undefined)?.status]] as const) {
    if (!isObject(value)) continue
    const known: readonly string[] = KNOWN[place]
    const param = Object.keys(value).find(name => !known.includes(name))
    if (param !== undefined) throw epdError('EPD_ERR_INVALID_BODY', [`unknown member ${JSON.stringify(param)} of the ${place}, which may have: ${known.join(', ')}`], { param })
  }
}

const TERMINATE_MS = 5_000

/**
 * LMDeploy's node management, with its shapes and strings. LMDeploy's api_servers and tools check for status 200 only.
 * A node registers before it listens, so no route waits for the node.
 */
export const nodeRoutes: FastifyPluginAsync<NodeRoutesOptions> = async function nodeRoutes (app, { gateway, transient }) {
  const { registry } = gateway
  app.setErrorHandler(onRouteError)
  app.addHook('onRequest', requireOperator(gateway))
  // JSON only: a page of another site can post text to loopback without a CORS preflight, but not JSON.
  app.removeContentTypeParser('text/plain')

  app.get('/nodes/status', async () => registry.status())

  app.post<{ Body: NodeBody }>('/nodes/add', { schema: { body: nodeBody }, preValidation: refuseUnknown }, async (request, reply) => {
    const { url, status } = request.body
    const { role, models = [], speed } = status ?? {}
    try {
      const added = registry.add({
        url,
        ...(role === undefined ? {} : { role: ROLE_FROM_WIRE[role]! }),
        ...(models.length === 0 ? {} : { models }),
        ...(typeof speed === 'number' ? { speed } : {})
      }, { peer: request.ip, ...(transient === true ? { transient } : {}) })
      reply.header(NODE_TOKEN_HEADER, added.token)
      return say(reply, 'Added successfully')
    } catch (err) {
      if (!(err instanceof TypeError)) throw err
      request.log.warn({ err }, 'a node could not be added')
      return say(reply, 'Failed to add, please check the input url.')
    }
  })

  app.post<{ Body: NodeBody }>('/nodes/remove', { schema: { body: nodeBody } }, async (request, reply) =>
    say(reply, registry.remove(request.body.url) ? 'Deleted successfully' : 'Failed to delete, please check the input url.'))

  app.post<{ Body: NodeBody }>('/nodes/terminate', { schema: { body: nodeBody } }, async (request, reply) =>
    say(reply, await terminate(gateway, request.body.url) ? 'Terminated successfully' : `Failed to terminate node ${request.body.url}`))

  for (const [path, on] of [['/nodes/drain', true], ['/nodes/undrain', false]] as const) {
    app.post<{ Body: NodeBody }>(path, { schema: { body: nodeBody } }, async request => {
      const { url } = request.body
      if (!registry.drain(url, on)) throw epdError('EPD_ERR_UNKNOWN_NODE', [url], { param: 'url' })
      const { id, state, load } = registry.get(url)!
      return { url: id, health: state, unfinished: load.requests }
    })
  }

  app.post('/distserve/connection_warmup', async () => {
    const links = await registry.warmUp()
    const failed = links.filter(link => link.state !== 'linked')
    return failed.length === 0 ? { SUCCESS: true } : { SUCCESS: false, failed: failed.map(({ from, to, state, reason }) => ({ from, to, state, reason })) }
  })
}

/** Answers with a JSON string as the whole body, as FastAPI does. */
function say (reply: FastifyReply, text: string): FastifyReply {
  return reply.type('application/json').send(JSON.stringify(text))
}

async function terminate (gateway: Gateway, url: string): Promise<boolean> {
  const node = gateway.registry.get(url)
  if (node === undefined) return false
  try {
    const call = { signal: AbortSignal.timeout(TERMINATE_MS), headers: {}, dispatcher: gateway.dispatcher, log: gateway.log }
    const answer = await requestJson(node, { method: 'GET', path: '/terminate', timeout: 0 }, call)
    return answer.statusCode < 300
  } catch (err) {
    gateway.log.warn({ err, node: url }, 'node was not terminated')
    return false
  }
}
