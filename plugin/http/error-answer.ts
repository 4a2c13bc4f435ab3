import type { FastifyError, FastifyReply, FastifyRequest } from 'fastify'
import { AdapterError } from '../../adapters/adapter.ts'
import { isEpdError, toEpdError, toReply, type EpdErrorCode } from '../errors.ts'
import { passHeaders } from './client.ts'
import { callersTraceId } from '../telemetry/propagation.ts'

/** Errors that leave a request's body unread. */
const UNREAD: ReadonlySet<EpdErrorCode> = new Set(['EPD_ERR_BODY_TOO_LARGE', 'EPD_ERR_CONTENT_ENCODING', 'EPD_ERR_CLIENT_CLOSED_REQUEST'])
/** Longest chain of an error and its causes in the log. */
const MAX_REASONS = 4

/** Error handler of the plugin's own routes. Errors of the application's hooks (rate limits, its own auth) go to the application's error handler. */
export function onRouteError (err: FastifyError, request: FastifyRequest, reply: FastifyReply): FastifyReply {
  const foreign = toEpdError(err).code === 'EPD_ERR_INTERNAL' && typeof err.statusCode === 'number'
  if (foreign) throw err
  return sendError(request, reply, err)
}

/** What the log says. A stack only for unexpected errors: a node outage repeats, so it gets one line. */
function whyOf (err: unknown, code: string | undefined): object {
  if (!(err instanceof Error) || code === 'EPD_ERR_INTERNAL' || (code === undefined && !AdapterError.is(err))) return { err }
  const reasons: string[] = []
  let node: string | undefined
  for (let one: unknown = err; one instanceof Error && reasons.length < MAX_REASONS; one = one.cause) {
    if (!reasons.some(reason => reason.endsWith(one.message))) reasons.push(one.message)
    if (AdapterError.is(one)) node ??= one.node
  }
  return { node, reason: reasons.join(': ') }
}

/** Answers with an error in OpenAI's shape, or with the upstream's own as it came. */
export function sendError (request: FastifyRequest, reply: FastifyReply, err: unknown, headers: Readonly<Record<string, string>> = {}, traceId?: string): FastifyReply {
  const answer = toReply(err)
  // A request that failed before it was routed is in no trace of the gateway's; it may be in its client's.
  const id = traceId ?? callersTraceId(request.headers)
  const trace = id === undefined ? {} : { trace_id: id }
  if (answer.statusCode >= 500) request.log.error({ ...trace, ...whyOf(answer.error?.cause ?? err, answer.error?.code), code: answer.error?.code, upstream: answer.error === undefined ? answer.statusCode : undefined }, 'request failed')
  else request.log.info({ ...trace, code: answer.error?.code, upstream: answer.error === undefined ? answer.statusCode : undefined }, 'request refused')
  if (reply.sent) return reply
  // The rest of an unread body would be parsed as the next request.
  if (isEpdError(err) && UNREAD.has(err.code)) reply.header('connection', 'close')
  if (answer.nodeHeaders !== undefined) passHeaders({ headers: answer.nodeHeaders }, reply)
  return reply.code(answer.statusCode).headers({ ...headers, ...answer.headers, 'content-type': answer.contentType }).send(answer.body)
}
