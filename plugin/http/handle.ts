import { randomBytes } from 'node:crypto'
import type { FastifyReply, FastifyRequest } from 'fastify'
import { parseBody, parseBodyValue, type Body } from '../body/index.ts'
import { epdError } from '../errors.ts'
import type { Gateway } from '../gateway.ts'
import type { Bypass } from '../options/index.ts'
import { serve, type KeyHolder, type Served } from '../pipeline/index.ts'
import { modelFor } from './aliases.ts'
import { deliver, onClientGone } from './client.ts'
import { sendError } from './error-answer.ts'
import { upstreamPath } from './upstream-path.ts'

export interface HandleOverrides {
  /** Another model than the body's, such as what an alias stands for. */
  readonly model?: string
  /** Top-level members to set in the body. */
  readonly set?: Readonly<Record<string, unknown>>
  readonly tenant?: string
  readonly bypass?: Bypass
  /** Path below the node's URL. @default from the request's URL, else `/v1/chat/completions` */
  readonly path?: string
}

export interface HandleOptions {
  /** The body as bytes or text of JSON, or as a value. @default the raw bytes when they were kept, else `request.body` */
  readonly body?: unknown
  readonly overrides?: HandleOverrides
}

/** Answers a request through EPD, errors included: it never rejects. Returns the reply, for handlers to return. */
export type Handle = (request: FastifyRequest, reply: FastifyReply, options?: HandleOptions) => Promise<FastifyReply>

export const CHAT_PATH = '/v1/chat/completions'

/** Raw bodies kept for requests whose route parses them too. */
export type RawBodies = WeakMap<FastifyRequest, Buffer>

/** On a request whose body is read by the plugin: when that began. */
export const kArrivedAt = Symbol('fastify-epd.arrivedAt')
export interface Arriving { [kArrivedAt]?: number }

/** On a request with a named key: whose it is, for fairness between callers, and which models it may use. */
export const kHolder = Symbol('fastify-epd.holder')
export interface Held { [kHolder]?: KeyHolder & { readonly models?: readonly string[] | undefined } }

/** On a request whose end others want to know: the access log, a key's usage. */
export const kWatches = Symbol('fastify-epd.watches')
export interface Watched { [kWatches]?: Watch[] }
export interface Watch {
  /** The core will have it, unless this throws; `ended` will be called in any case. */
  began? (body: Body): void | Promise<void>
  ended (served: Served, body: Body): void
}

const INSTANCE = randomBytes(4).toString('hex')
let calls = 0

/**
 * The request's id, for joining logs, made unique: nodes abort by it, `req-1` is every gateway's first request, and with
 * `requestIdHeader` clients choose theirs.
 */
export function callId (id: unknown): string {
  return `${String(id).slice(0, 64).replace(/[^\w.:-]/g, '_')}.${INSTANCE}${(calls++).toString(36)}`
}

export function createHandle (gateway: Gateway, rawBodies: RawBodies): Handle {
  return async function handle (request, reply, { body: given, overrides = {} } = {}) {
    const { options } = gateway
    let body: Body
    let path: string
    try {
      path = overrides.path ?? pathOf(request.url)
      body = await readRequest(given ?? rawBodies.get(request) ?? request.body, overrides, options.limits.items)
      if (Object.hasOwn(options.aliases, body.model)) body = await readRequest(body, { model: modelFor(gateway, body.model)! }, options.limits.items)
    } catch (err) {
      return sendError(request, reply, err)
    }
    const served = await watched(request, body, async () => await serve(gateway, {
      body,
      path,
      id: callId(request.id),
      headers: request.headers,
      onClientGone: listener => { onClientGone(reply.raw, listener) },
      arrivedAt: (request as Arriving)[kArrivedAt],
      log: request.log,
      holder: (request as Held)[kHolder],
      tenant: overrides.tenant ?? tenantOf(request, options.tenant),
      bypass: overrides.bypass
    }, (answer, headers) => { deliver(answer, reply, options.headers ? headers : {}) }))
    if (served.delivery !== undefined) return reply
    return sendError(request, reply, served.error, options.headers ? served.headers : {}, served.traceId)
  }
}

/** Serves a request unless one of its watches refuses it. They see its end. */
export async function watched (request: FastifyRequest & Watched, body: Body, serve: () => Promise<Served>): Promise<Served> {
  const { [kWatches]: watches = [] } = request
  let served: Served
  try {
    for (const watch of watches) await watch.began?.(body)
    served = await serve()
  } catch (error) {
    served = { error, headers: {} }
  }
  for (const watch of watches) watch.ended(served, body)
  return served
}

async function readRequest (source: unknown, overrides: HandleOverrides, maxItems: number): Promise<Body> {
  let body = isScanned(source) ? source : Buffer.isBuffer(source) ? await parseBody(source) : await parseBodyValue(source)
  if (overrides.model !== undefined || overrides.set !== undefined) {
    const members = Object.entries({ ...overrides.set, ...(overrides.model === undefined ? {} : { model: overrides.model }) })
    body = await parseBody(Buffer.concat(body.splice({ set: Object.fromEntries(members.map(([name, value]) => [name, JSON.stringify(value)])) })))
  }
  if (body.media.length > maxItems) throw epdError('EPD_ERR_TOO_MANY_MEDIA', [maxItems], { param: 'messages' })
  return body
}

function isScanned (source: unknown): source is Body {
  return typeof source === 'object' && source !== null && 'splice' in source && 'bytes' in source && 'media' in source
}

/** Path below the node's URL. A route of the application that names no path of the API is a chat. */
function pathOf (url: string): string {
  const [path] = url.split('?', 1) as [string]
  const start = path.indexOf('/v1/')
  return start === -1 ? CHAT_PATH : upstreamPath(path.slice(start))
}

function tenantOf (request: FastifyRequest, tenant: Gateway['options']['tenant']): string | undefined {
  if (tenant === undefined) return undefined
  if (typeof tenant === 'function') return tenant(request)
  const value = request.headers[tenant.toLowerCase()]
  return Array.isArray(value) ? value[0] : value
}
