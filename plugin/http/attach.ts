import { Readable } from 'node:stream'
import type { FastifyInstance, FastifyReply, preParsingHookHandler, RouteHandlerMethod, RouteOptions } from 'fastify'
import { parseBody, readBody, type Body, type RequestLike } from '../body/index.ts'
import type { Gateway } from '../gateway.ts'
import type { Handle, RawBodies } from './handle.ts'

interface Attaching {
  readonly gateway: Gateway
  readonly handle: Handle
  readonly rawBodies: RawBodies
}

type RequestStream = RequestLike & { receivedEncodedLength?: number }

const FASTIFY_BODY_LIMIT = 1_048_576

/**
 * Lets routes of the application go through EPD: those with `config: { epd: true }` and those whose URL is in `attach`,
 * declared after the plugin. Requests with media for a model that EPD serves are answered by EPD; all others reach the
 * route's own handler, untouched.
 */
export function attachRoutes (app: FastifyInstance, attaching: Attaching): void {
  const { attach } = attaching.gateway.options
  app.addHook('onRoute', route => {
    const posts = Array.isArray(route.method) ? route.method.includes('POST') : route.method === 'POST'
    if (!posts || (route.config?.epd !== true && !attach.includes(route.url))) return
    // Fastify's default would refuse any photograph; a limit that the application has chosen stands.
    if (route.bodyLimit === undefined && app.initialConfig.bodyLimit === FASTIFY_BODY_LIMIT) route.bodyLimit = attaching.gateway.options.limits.body
    route.preParsing = [...listed(route.preParsing), keepRaw(attaching.rawBodies, route.bodyLimit ?? app.initialConfig.bodyLimit ?? FASTIFY_BODY_LIMIT)]
    route.handler = divert(route, attaching)
  })
}

function listed (hooks: RouteOptions['preParsing']): preParsingHookHandler[] {
  return hooks === undefined ? [] : Array.isArray(hooks) ? hooks as preParsingHookHandler[] : [hooks as preParsingHookHandler]
}

function keepRaw (rawBodies: RawBodies, limit: number): preParsingHookHandler {
  return async (request, _reply, payload) => {
    if (!/^application\/json\b/i.test(request.headers['content-type'] ?? '')) return payload
    const stream: RequestStream = payload
    const bytes = await readBody(stream, { limit })
    rawBodies.set(request, bytes)
    // Fastify's parser compares what it receives with content-length. A hook before this one may have decoded it.
    const again = Object.assign(new Readable({ read () {} }), { receivedEncodedLength: stream.receivedEncodedLength ?? bytes.length })
    again.push(bytes)
    again.push(null)
    return again
  }
}

function divert (route: RouteOptions, { gateway, handle, rawBodies }: Attaching): RouteHandlerMethod {
  const own = route.handler
  return function diverted (request, reply) {
    const bytes = rawBodies.get(request)
    if (bytes === undefined) return own.call(this, request, reply)
    return forEpd(gateway, bytes).then(body => {
      if (body !== undefined) return handle(request, reply, { body })
      const result: unknown = own.call(this, request, reply)
      // A handler of the callback kind sends later: the reply itself is what to wait for.
      return result === undefined ? reply : result
    }) as Promise<FastifyReply>
  }
}

async function forEpd (gateway: Gateway, bytes: Buffer): Promise<Body | undefined> {
  try {
    const body = await parseBody(bytes)
    return body.media.length > 0 && gateway.serves(body.model) ? body : undefined
  } catch {
    // Not a body we understand: its own handler says what is wrong with it.
    return undefined
  }
}
