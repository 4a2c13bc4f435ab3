import { context } from '@opentelemetry/api'
import type { FastifyReply, FastifyRequest } from 'fastify'
import { abortable, TimeLimit } from '../../../adapters/abort.ts'
import { AdapterError } from '../../../adapters/adapter.ts'
import { send } from '../../../adapters/http.ts'
import { REQUEST_ID_HEADER } from '../../../adapters/wire/headers.ts'
import { epdError } from '../../errors.ts'
import type { Gateway } from '../../gateway.ts'
import { beginAnswer, type Cancellable, type Delivery } from '../../pipeline/index.ts'
import { byLoad } from '../../planning/index.ts'
import { usable } from '../../registry/index.ts'
import { parentContext, propagationHeaders } from '../../telemetry/propagation.ts'
import { deliver, onClientGone } from '../client.ts'
import { sendError } from '../error-answer.ts'
import { callId } from '../handle.ts'

/**
 * Forwards a request without a body to a healthy node, and its answer back. It names no model, so any node will do. The
 * node's status codes are passed on, errors included.
 */
export async function forwardBodiless (gateway: Gateway, request: FastifyRequest, reply: FastifyReply, path: string): Promise<FastifyReply> {
  const ready = gateway.registry.snapshot().nodes.filter(node => usable(node, 'decode'))
  const node = byLoad(ready.filter(({ role }) => role === 'hybrid'))[0] ?? byLoad(ready.filter(({ role }) => role === 'decode'))[0]
  if (gateway.draining) return sendError(request, reply, epdError('EPD_ERR_CLOSING'))
  if (node === undefined) return sendError(request, reply, epdError('EPD_ERR_NO_NODE', ['*']))
  const { timeouts } = gateway.options
  const limit = new TimeLimit(timeouts.answer)
  onClientGone(reply.raw, () => { limit.abort(epdError('EPD_ERR_CLIENT_CLOSED_REQUEST')) })
  const inFlight: Cancellable = { cancel: reason => { limit.abort(reason) } }
  gateway.requests.add(inFlight)
  const ticket = gateway.registry.acquire(node.id, 'decode')
  try {
    const trace = parentContext(request.headers)
    const headers = { ...propagationHeaders(trace, request.headers), [REQUEST_ID_HEADER]: callId(request.id) }
    const call = { signal: limit, headers, dispatcher: gateway.dispatcher, log: request.log }
    const upstream = await context.with(trace, () => abortable(send(node, { method: request.method as 'GET' | 'DELETE', path }, call), limit))
    const answer = await beginAnswer(node.id, upstream, limit, timeouts.idle)
    deliver(answer, reply, {})
    ticket.end(failureOf(await answer.delivered, limit, node.id))
    return reply
  } catch (err) {
    ticket.end(limit.timedOut ? new AdapterError('UNAVAILABLE', 'no answer in time', { node: node.id, cause: err }) : err)
    return sendError(request, reply, limit.timedOut ? epdError('EPD_ERR_UPSTREAM_TIMEOUT', [], { cause: err }) : err)
  } finally {
    limit.clear()
    gateway.requests.delete(inFlight)
  }
}

/** What the end of an answer says about its node: nothing, when the client or the gateway ended it. */
function failureOf ({ outcome, error }: Delivery, limit: TimeLimit, node: string): Error | undefined {
  if (outcome === 'complete') return undefined
  if (outcome === 'client_gone' || (limit.aborted && !limit.timedOut)) return new DOMException('aborted', 'AbortError')
  return new AdapterError('UNAVAILABLE', 'the answer broke off', { node, cause: error })
}
