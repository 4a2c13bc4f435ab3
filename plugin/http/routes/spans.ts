import { promisify } from 'node:util'
import { gunzip } from 'node:zlib'
import type { FastifyPluginAsync, FastifyReply, FastifyRequest } from 'fastify'
import type { Gateway } from '../../gateway.ts'
import { readProtobufTraces } from '../../traces/otlp-protobuf.ts'
import { parseOtlpTraces } from '../../traces/otlp.ts'
import type { TraceStore } from '../../traces/store.ts'
import { createKeyCheck, requireOperator, type Guarded } from './guard.ts'
import { answerErrors, sendError } from './traces.ts'

export interface SpanRoutesOptions {
  readonly gateway: Guarded & {
    readonly stats: Pick<Gateway['stats'], 'noteSpan'>
    readonly tracing: { readonly store: TraceStore | undefined }
    readonly registry: Pick<Gateway['registry'], 'isNodeToken'>
  }
}

const BODY_LIMIT = 4 * 1024 * 1024
const PROTOBUF = 'application/x-protobuf'
const gunzipped = promisify(gunzip)

/**
 * POST /epd/otlp/v1/traces: OTLP over HTTP, as JSON or protobuf, also with gzip. Not there when no traces are kept.
 * Registered nodes send all their spans, whatever trace they are of. Operators' servers and collectors send too, but only
 * to traces that a request of the gateway is in: a vLLM server also tells of its start, and of requests of others.
 * Register it without fastify-plugin: its parsers and error shape are meant to stay inside.
 */
export const spanRoutes: FastifyPluginAsync<SpanRoutesOptions> = async function spanRoutes (app, { gateway }) {
  const { store } = gateway.tracing
  if (store === undefined) return
  const isOperators = requireOperator(gateway)
  answerErrors(app)
  // Only these are taken, whatever is in force outside.
  app.removeAllContentTypeParsers()
  app.addContentTypeParser(['application/json', PROTOBUF], { parseAs: 'buffer', bodyLimit: BODY_LIMIT }, async (request: FastifyRequest, body: Buffer) => await parse(request, body))
  app.post('/epd/otlp/v1/traces', {
    bodyLimit: BODY_LIMIT,
    // Before the body is read: a stranger must not make the gateway take 4 MiB.
    onRequest: (request, reply, done) => {
      if (nodeOf(request, gateway) !== undefined) { done(); return }
      const { headers: { authorization } } = request
      const { adminKey } = gateway.options
      // A node with a token that is no longer good must learn of it, from wherever it sends.
      const decide = (admitted: boolean): void => { if (admitted) done(); else stranger(reply) }
      if (authorization === undefined) isOperators.call(app, request, reply, err => { decide(err === undefined) })
      else decide(adminKey !== undefined && createKeyCheck([adminKey])(request))
    }
  }, async (request, reply) => {
    // The token says whose spans these are.
    const node = nodeOf(request, gateway)
    const parsed = parseOtlpTraces(request.body, node)
    if (parsed === undefined) return sendError(reply, 400, 'The body is not an OTLP ExportTraceServiceRequest.', 'invalid_request')
    for (const span of parsed.spans) {
      if (node === undefined && !store.has(span.traceId)) continue
      const kept = store.add(span)
      if (kept !== undefined && node !== undefined) gateway.stats.noteSpan(kept)
    }
    return answer(request, reply, parsed.rejected)
  })
}

function answer ({ headers }: FastifyRequest, reply: FastifyReply, rejected: number): FastifyReply {
  const errorMessage = 'malformed or too many spans'
  if (!isProtobuf(headers['content-type'])) return reply.send(rejected === 0 ? {} : { partialSuccess: { rejectedSpans: String(rejected), errorMessage } })
  // partial_success { error_message }
  return reply.type(PROTOBUF).send(rejected === 0 ? Buffer.alloc(0) : Buffer.from(`\n${String.fromCharCode(errorMessage.length + 2)}\x12${String.fromCharCode(errorMessage.length)}${errorMessage}`))
}

/** @throws with status 400, 413 or 415 */
async function parse ({ headers }: FastifyRequest, body: Buffer): Promise<unknown> {
  const bytes = await decoded(headers['content-encoding'], body)
  const protobuf = isProtobuf(headers['content-type'])
  try {
    return protobuf ? readProtobufTraces(bytes) : JSON.parse(bytes.toString())
  } catch (cause) {
    throw failure(400, `The body is not valid ${protobuf ? 'protobuf' : 'JSON'}.`, cause)
  }
}

async function decoded (encoding: string | undefined, body: Buffer): Promise<Buffer> {
  if (encoding === undefined || encoding === 'identity') return body
  if (encoding !== 'gzip') throw failure(415, 'The body must be sent as it is, or with gzip.')
  try {
    return await gunzipped(body, { maxOutputLength: BODY_LIMIT })
  } catch (cause) {
    if ((cause as NodeJS.ErrnoException).code === 'ERR_BUFFER_TOO_LARGE') throw failure(413, `The body is larger than ${BODY_LIMIT} bytes.`, cause)
    throw failure(400, 'The body is not valid gzip.', cause)
  }
}

function isProtobuf (contentType = ''): boolean {
  return contentType.startsWith(PROTOBUF)
}

function failure (statusCode: number, message: string, cause?: unknown): Error {
  return Object.assign(new Error(message, { cause }), { statusCode })
}

function stranger (reply: FastifyReply): FastifyReply {
  return sendError(reply, 401, 'Spans are taken from registered nodes, from this machine and allowed networks, and with the admin key.', 'invalid_api_key')
}

function nodeOf ({ headers: { authorization } }: FastifyRequest, { registry }: SpanRoutesOptions['gateway']): string | undefined {
  const token = /^Bearer (\S{1,256})$/i.exec(authorization ?? '')?.[1]
  return token === undefined ? undefined : registry.isNodeToken(token)
}
