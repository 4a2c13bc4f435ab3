import { createHash, timingSafeEqual } from 'node:crypto'
import Fastify, { LogController, type FastifyError, type FastifyInstance, type FastifyRequest, type FastifyServerOptions, type onRequestHookHandler } from 'fastify'
import { EngineError, errorBody, type EngineErrorCode } from '../service/errors.ts'
import { parseBody } from './json-body.ts'
import { controlRoutes, distserveRoutes } from './routes-control.ts'
import { requireOperator } from './operator.ts'
import { openaiRoutes } from './routes-openai.ts'
import type { ServerState } from './state.ts'

export interface AppOptions {
  /** Asked for as bearer token on every route but /health. */
  readonly apiKey?: string | undefined
  /** Bytes. @default 64 MiB */
  readonly bodyLimit?: number | undefined
  /** A stream whose client takes nothing for so long is ended, milliseconds. @default 30_000 */
  readonly unreadTimeoutMs?: number | undefined
  /** Fastify's logger options. @default no log */
  readonly logger?: FastifyServerOptions['logger']
}

const DEFAULT_BODY_LIMIT = 64 * 1024 * 1024
const DEFAULT_UNREAD_TIMEOUT_MS = 30_000

/** The HTTP side of an engine: its routes, the check of its key, and errors in OpenAI's shape. */
export function buildApp ({ apiKey, bodyLimit = DEFAULT_BODY_LIMIT, unreadTimeoutMs = DEFAULT_UNREAD_TIMEOUT_MS, logger = false }: AppOptions, state: ServerState): FastifyInstance {
  const app = Fastify({
    logger,
    bodyLimit,
    // A log line for each request would cost as much as serving it.
    logController: new LogController({ disableRequestLogging: true }),
    // Until it closes, a draining engine answers by itself: /health, and the error `draining`.
    return503OnClosing: false
  })
  const parse = app.getDefaultJsonParser('error', 'error')
  app.addContentTypeParser<Buffer>('application/json', { parseAs: 'buffer' }, async (request: FastifyRequest, body: Buffer) => {
    // Fastify's parser answers by a callback, in the same turn.
    return await parseBody(body, text => {
      let value: unknown
      parse(request, text, (err, parsed) => {
        if (err !== null) throw err
        value = parsed
      })
      return value
    })
  })
  app.setErrorHandler<FastifyError>((err, request, reply) => {
    const known = EngineError.is(err) ? err : fromFastify(err)
    if (known === undefined) request.log.error({ err }, 'request failed')
    if (known?.retryAfter !== undefined) reply.header('retry-after', known.retryAfter)
    return reply.code(known?.status ?? 500).send(errorBody(known ?? err))
  })
  app.setNotFoundHandler(request => {
    throw new EngineError('not_found', `No route ${request.method} ${request.url.split('?', 1)[0]!.slice(0, 200)}.`)
  })
  if (apiKey !== undefined) app.addHook('onRequest', bearerAuth(apiKey))
  openaiRoutes(app, state, unreadTimeoutMs)
  const operator = requireOperator(apiKey)
  controlRoutes(app, state, operator)
  distserveRoutes(app, state, operator)
  return app
}

/** Fastify's own errors about a request: JSON, size, content type. */
function fromFastify (err: FastifyError): EngineError | undefined {
  const status = err.statusCode ?? 500
  if (status >= 500) return undefined
  const code: EngineErrorCode = status === 413 ? 'request_too_large' : 'invalid_request'
  return new EngineError(code, err.message, { cause: err })
}

/** Routes open without a key, as in LMDeploy: liveness probes carry none. */
const EXEMPT = ['/health', '/nodes']

/** Checks `Authorization: Bearer`. It compares digests, so that the time it takes shows neither content nor length of the key. */
function bearerAuth (apiKey: string): onRequestHookHandler {
  const expected = digest(apiKey)
  return async function checkBearer (request) {
    if (EXEMPT.some(prefix => request.url === prefix || request.url.startsWith(prefix + '/') || request.url.startsWith(prefix + '?'))) return
    const given = /^Bearer (.+)$/i.exec(request.headers.authorization ?? '')?.[1]
    if (given === undefined || !timingSafeEqual(digest(given), expected)) {
      throw new EngineError('invalid_api_key', 'Missing or wrong API key: send Authorization: Bearer <key>.')
    }
  }
}

function digest (text: string): Buffer {
  return createHash('sha256').update(text).digest()
}
