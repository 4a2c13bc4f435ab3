import type { FastifyInstance, FastifyPluginAsync, FastifyReply, onRequestHookHandler } from 'fastify'
import { openAiError } from '../../../adapters/wire/openai-error.ts'
import type { Gateway } from '../../gateway.ts'
import type { TraceFilter, TraceStatus } from '../../traces/summary.ts'

export interface TraceRoutesOptions {
  readonly gateway: { readonly tracing: Pick<Gateway['tracing'], 'store' | 'off'> }
  /** Decides who may look. */
  readonly guard: onRequestHookHandler
}

interface ListQuery { model?: string, plan?: string, status?: TraceStatus, min_duration_ms?: number, search?: string, limit?: number }

const LIST_PARAMETERS = {
  model: { type: 'string', maxLength: 256 },
  plan: { type: 'string', maxLength: 32 },
  status: { enum: ['ok', 'error', 'refused', 'aborted'] },
  min_duration_ms: { type: 'number', minimum: 0 },
  search: { type: 'string', maxLength: 256 },
  limit: { type: 'integer', minimum: 1, maximum: 1_000 }
} as const
/** `additionalProperties: false` would make Fastify drop a misspelt filter, and show every trace. */
const LIST_SCHEMA = {
  querystring: { type: 'object', propertyNames: { enum: Object.keys(LIST_PARAMETERS) }, properties: LIST_PARAMETERS }
} as const

/**
 * GET /epd/traces and GET /epd/traces/:id. Register it without fastify-plugin: its error shape is meant to stay inside.
 */
export const traceRoutes: FastifyPluginAsync<TraceRoutesOptions> = async function traceRoutes (app, { gateway: { tracing }, guard }) {
  answerErrors(app)
  app.addHook('onRequest', guard)
  app.addHook('onRequest', async (_request, reply) => {
    const { off } = tracing
    if (off !== undefined) return sendError(reply, 404, `This gateway keeps no traces: ${off}.`, 'tracing_off')
  })
  app.get<{ Querystring: ListQuery }>('/epd/traces', { schema: LIST_SCHEMA, schemaErrorFormatter: queryError }, async request => {
    return { traces: tracing.store?.list(filterOf(request.query)) }
  })
  app.get<{ Params: { id: string } }>('/epd/traces/:id', async (request, reply) => {
    const trace = tracing.store?.get(request.params.id.toLowerCase())
    return trace ?? sendError(reply, 404, 'No such trace: it was not sampled, or newer ones have taken its place.', 'trace_not_found')
  })
}

/** Errors in the shape of OpenAI's. */
export function answerErrors (app: FastifyInstance): void {
  app.setErrorHandler<Error & { statusCode?: number, code?: string }>((err, request, reply) => {
    const status = err.statusCode ?? 500
    if (status >= 500) request.log.error({ err }, 'trace route failed')
    return sendError(reply, status, status < 500 ? err.message : 'Internal error', status < 500 ? 'invalid_request' : 'internal')
  })
}

function queryError (problems: ReadonlyArray<{ readonly keyword: string, readonly instancePath: string, readonly message?: string, readonly params: Record<string, unknown> }>): Error {
  const unknown = problems.find(({ keyword }) => keyword === 'propertyNames')
  if (unknown !== undefined) return new Error(`There is no parameter '${String(unknown.params.propertyName)}'; there are ${Object.keys(LIST_PARAMETERS).join(', ')}.`)
  return new Error(problems.map(({ instancePath, params, message }) => `${instancePath.slice(1)} ${message}${Array.isArray(params.allowedValues) ? `: ${params.allowedValues.join(', ')}` : ''}`).join('; '))
}

function filterOf (query: ListQuery): TraceFilter {
  return { model: query.model, plan: query.plan, status: query.status, minDurationMs: query.min_duration_ms, search: query.search, limit: query.limit }
}

export function sendError (reply: FastifyReply, status: number, message: string, code: string): FastifyReply {
  return reply.code(status).send({ error: openAiError(status, message, code) })
}
