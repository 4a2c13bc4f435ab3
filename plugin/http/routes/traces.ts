import type { FastifyInstance, FastifyPluginAsync, FastifyReply, onRequestHookHandler } from 'fastify'
import type { ParsedSpans } from '../../traces/otlp-json.ts'
import { readSpans } from '../../traces/otlp-text.ts'
import type { StoredSpan } from '../../traces/stored-span.ts'
import type { TraceStore } from '../../traces/trace-store.ts'
import type { TraceFilter, TraceStatus } from '../../traces/trace-view.ts'

export interface TraceRoutesOptions {
  readonly store: TraceStore
  /** The id of the node a bearer token belongs to; undefined for any other token. */
  readonly isNodeToken: (token: string) => string | undefined
  /** Runs before the two reading routes: who may look. */
  readonly guard?: onRequestHookHandler | undefined
  /** Told of each span that came in and was not there yet. */
  readonly onSpan?: ((span: StoredSpan) => void) | undefined
}

interface ListQuery { model?: string, plan?: string, status?: TraceStatus, min_duration_ms?: number, limit?: number }

const OTLP_BODY_LIMIT = 4 * 1024 * 1024
const LIST_PARAMETERS = {
  model: { type: 'string', maxLength: 256 },
  plan: { type: 'string', maxLength: 32 },
  status: { enum: ['ok', 'error', 'aborted'] },
  min_duration_ms: { type: 'number', minimum: 0 },
  limit: { type: 'integer', minimum: 1, maximum: 1_000 }
} as const
/** `additionalProperties: false` would make Fastify drop a filter that is misspelt, and show all there is. */
const LIST_SCHEMA = {
  querystring: { type: 'object', propertyNames: { enum: Object.keys(LIST_PARAMETERS) }, properties: LIST_PARAMETERS }
} as const

/**
 * GET /epd/traces, GET /epd/traces/:id, and POST /epd/otlp/v1/traces for the spans of registered nodes.
 * Register it without fastify-plugin: its content type parser and error shape are meant to stay inside.
 */
export const traceRoutes: FastifyPluginAsync<TraceRoutesOptions> = async function traceRoutes (app, options) {
  app.setErrorHandler<Error & { statusCode?: number, code?: string }>((err, request, reply) => {
    const status = err.statusCode ?? 500
    if (status >= 500) request.log.error({ err }, 'trace route failed')
    return reply.code(status).send(errorBody(status < 500 ? err.message : 'Internal error', status < 500 ? 'invalid_request' : 'internal'))
  })
  // Only JSON is taken, whatever is in force outside, and it stays bytes: most of it need not be parsed.
  app.removeAllContentTypeParsers()
  app.addContentTypeParser<Buffer>('application/json', { parseAs: 'buffer', bodyLimit: OTLP_BODY_LIMIT }, (_request, body, done) => { done(null, body) })
  reading(app, options)
  receiving(app, options)
}

function reading (app: FastifyInstance, { store, guard }: TraceRoutesOptions): void {
  const onRequest = guard === undefined ? [] : [guard]
  app.get<{ Querystring: ListQuery }>('/epd/traces', { schema: LIST_SCHEMA, schemaErrorFormatter: queryError, onRequest }, async request => {
    return { traces: store.list(filterOf(request.query)) }
  })
  app.get<{ Params: { id: string } }>('/epd/traces/:id', { onRequest }, async (request, reply) => {
    const trace = store.get(request.params.id.toLowerCase())
    if (trace !== undefined) return trace
    return reply.code(404).send(errorBody('No such trace: it was not sampled, or newer ones have taken its place.', 'trace_not_found'))
  })
}

function receiving (app: FastifyInstance, { store, isNodeToken, onSpan }: TraceRoutesOptions): void {
  const stranger = (reply: FastifyReply): FastifyReply => reply.code(401).send(errorBody('Spans are taken from registered nodes only.', 'invalid_api_key'))
  app.post<{ Body: Buffer | undefined }>('/epd/otlp/v1/traces', {
    bodyLimit: OTLP_BODY_LIMIT,
    // Before the body is read: a stranger must not make the gateway take 4 MiB.
    onRequest: async (request, reply) => { if (nodeOf(request.headers.authorization, isNodeToken) === undefined) return stranger(reply) }
  }, async (request, reply) => {
    // The token says whose spans these are.
    const node = nodeOf(request.headers.authorization, isNodeToken)
    if (node === undefined) return stranger(reply)
    const parsed = request.body === undefined ? undefined : spansOf(request.body, node)
    if (parsed === undefined) return reply.code(400).send(errorBody('The body is not an OTLP ExportTraceServiceRequest in JSON.', 'invalid_request'))
    for (const span of parsed.spans) if (store.add(span)) onSpan?.(span)
    return parsed.rejected === 0 ? {} : { partialSuccess: { rejectedSpans: String(parsed.rejected), errorMessage: 'malformed or too many spans' } }
  })
}

/** @throws with status 400 when the body is not JSON */
function spansOf (body: Buffer, node: string): ParsedSpans | undefined {
  try {
    return readSpans(body, node)
  } catch (cause) {
    throw Object.assign(new Error('The body is not valid JSON.', { cause }), { statusCode: 400 })
  }
}

function nodeOf (authorization: string | undefined, isNodeToken: TraceRoutesOptions['isNodeToken']): string | undefined {
  const token = /^Bearer (\S{1,256})$/i.exec(authorization ?? '')?.[1]
  return token === undefined ? undefined : isNodeToken(token)
}

function queryError (problems: ReadonlyArray<{ readonly keyword: string, readonly instancePath: string, readonly message?: string, readonly params: Record<string, unknown> }>): Error {
  const unknown = problems.find(({ keyword }) => keyword === 'propertyNames')
  if (unknown !== undefined) return new Error(`There is no parameter '${String(unknown.params.propertyName)}'; there are ${Object.keys(LIST_PARAMETERS).join(', ')}.`)
  return new Error(problems.map(({ instancePath, params, message }) => `${instancePath.slice(1)} ${message}${Array.isArray(params.allowedValues) ? `: ${params.allowedValues.join(', ')}` : ''}`).join('; '))
}

function filterOf (query: ListQuery): TraceFilter {
  return { model: query.model, plan: query.plan, status: query.status, minDurationMs: query.min_duration_ms, limit: query.limit }
}

function errorBody (message: string, code: string): object {
  return { error: { message, type: code === 'invalid_api_key' ? 'authentication_error' : code === 'internal' ? 'server_error' : 'invalid_request_error', code, param: null } }
}
