import { randomBytes } from 'node:crypto'
import type { FastifyError, FastifyReply, FastifyRequest } from 'fastify'
import { AdapterError } from '../../adapters/adapter.ts'
import { epdError, isEpdError, toEpdError, toReply, type EpdErrorCode } from '../errors.ts'
import { parseBody, parseBodyValue, type Body } from '../body/index.ts'
import { ClientConnection } from './client-connection.ts'
import type { Gateway } from '../gateway.ts'
import type { Bypass } from '../options/index.ts'
import { deliver } from './deliver.ts'
import { callersTraceId } from '../telemetry/propagation.ts'
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

/** Errors that leave a request's body unread. */
const UNREAD: ReadonlySet<EpdErrorCode> = new Set(['EPD_ERR_BODY_TOO_LARGE', 'EPD_ERR_CONTENT_ENCODING', 'EPD_ERR_CLIENT_CLOSED_REQUEST'])
const INSTANCE = randomBytes(4).toString('hex')
/** Of an error and its causes, those that the log tells. */
const MAX_REASONS = 4
let calls = 0

/**
 * The request's id, for joining logs, made unique: nodes abort by it, `req-1` is every gateway's first request, and with
 * `requestIdHeader` clients choose theirs.
 */
export function callId (id: unknown): string {
  return `${String(id).slice(0, 64).replace(/[^\w.:-]/g, '_')}.${INSTANCE}${(calls++).toString(36)}`
}

export function createHandle (gateway: Gateway, rawBodies: RawBodies): Handle {
  const { options } = gateway

  return async function handle (request, reply, { body: given, overrides = {} } = {}) {
    let body: Body
    let path: string
    try {
      path = overrides.path ?? pathOf(request.url)
      body = await readRequest(given ?? rawBodies.get(request) ?? request.body, overrides, options.limits.items)
    } catch (err) {
      return sendError(request, reply, err)
    }
    const served = await gateway.serve({
      body,
      path,
      id: callId(request.id),
      headers: request.headers,
      signal: new ClientConnection(reply.raw),
      arrivedAt: (request as Arriving)[kArrivedAt],
      log: request.log,
      tenant: overrides.tenant ?? tenantOf(request, options.tenant),
      bypass: overrides.bypass
    }, (upstream, headers) => deliver(upstream, reply, options.headers ? headers : {}))
    if (served.delivery !== undefined) return reply
    return sendError(request, reply, served.error, options.headers ? served.headers : {}, served.traceId)
  }
}

async function readRequest (source: unknown, overrides: HandleOverrides, maxItems: number): Promise<Body> {
  let body = isScanned(source) ? source : Buffer.isBuffer(source) ? await parseBody(source) : await parseBodyValue(source)
  if (overrides.model !== undefined || overrides.set !== undefined) {
    const members = Object.entries({ ...overrides.set, ...(overrides.model === undefined ? {} : { model: overrides.model }) })
    body = await parseBody(Buffer.concat(body.splice({ set: Object.fromEntries(members.map(([name, value]) => [name, JSON.stringify(value)])) })))
  }
  if (body.model === '') throw epdError('EPD_ERR_MISSING_VALUE', ['model'], { param: 'model' })
  if (body.media.length > maxItems) throw epdError('EPD_ERR_TOO_MANY_MEDIA', [maxItems], { param: 'messages' })
  return body
}

function isScanned (source: unknown): source is Body {
  return typeof source === 'object' && source !== null && 'splice' in source && 'bytes' in source && 'media' in source
}

/** Path below the node's URL. A route of the gateway's own may be called anything: it is then a chat. */
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

/**
 * Error handler of the plugin's own routes. What the application's hooks throw (rate limits, its own auth) is left to the
 * application's error handler.
 */
export function onRouteError (err: FastifyError, request: FastifyRequest, reply: FastifyReply): FastifyReply {
  const foreign = toEpdError(err).code === 'EPD_ERR_INTERNAL' && typeof err.statusCode === 'number'
  if (foreign) throw err
  return sendError(request, reply, err)
}

/** For the log. A stack is for what nobody has foreseen: nodes that are down are told in a line, of which an outage writes many. */
function whyOf (err: unknown, code: string | undefined): object {
  if (code === undefined || code === 'EPD_ERR_INTERNAL' || !(err instanceof Error)) return { err }
  const reasons: string[] = []
  let node: string | undefined
  for (let one: unknown = err; one instanceof Error && reasons.length < MAX_REASONS; one = one.cause) {
    if (!reasons.includes(one.message)) reasons.push(one.message)
    if (AdapterError.is(one)) node ??= one.node
  }
  return { node, reason: reasons.join(': ') }
}

/** Answers with an error in OpenAI's shape, or with the upstream's own as it came. */
export function sendError (request: FastifyRequest, reply: FastifyReply, err: unknown, headers: Readonly<Record<string, string>> = {}, traceId?: string): FastifyReply {
  const answer = toReply(err)
  // A request that failed before it was routed is in no trace of ours; it may be in its client's.
  const id = traceId ?? callersTraceId(request.headers)
  const trace = id === undefined ? {} : { trace_id: id }
  if (answer.statusCode >= 500) request.log.error({ ...trace, ...whyOf(answer.error?.cause ?? err, answer.error?.code), code: answer.error?.code }, 'request failed')
  else request.log.info({ ...trace, code: answer.error?.code, upstream: answer.error === undefined ? answer.statusCode : undefined }, 'request refused')
  if (reply.sent) return reply
  // The rest of an unread body would be parsed as the next request.
  if (isEpdError(err) && UNREAD.has(err.code)) reply.header('connection', 'close')
  return reply.code(answer.statusCode).headers({ ...headers, ...answer.headers, 'content-type': answer.contentType }).send(answer.body)
}
