import { context } from '@opentelemetry/api'
import type { FastifyReply, FastifyRequest } from 'fastify'
import { AdapterError } from '../../../adapters/adapter.ts'
import { send } from '../../../adapters/http.ts'
import { deliver } from '../deliver.ts'
import { epdError } from '../../errors.ts'
import type { Gateway } from '../../gateway.ts'
import { callId, sendError } from '../handle.ts'
import { CallScope } from '../../pipeline/call-scope.ts'
import { IdleWatch } from '../../pipeline/idle.ts'
import type { Cancellable, Delivery } from '../../pipeline/index.ts'
import { ClientGoneError } from '../relay/index.ts'
import { byLoad } from '../../planning/index.ts'
import { usable } from '../../registry/index.ts'
import { ClientConnection } from '../client-connection.ts'
import { parentContext, propagationHeaders, upstreamContext } from '../../telemetry/propagation.ts'

/**
 * Hands a request without a body to a healthy node as it is, and its answer back. It names no model, so any node will
 * do. Status codes of the node are passed on, errors included.
 */
export async function passOn (gateway: Gateway, request: FastifyRequest, reply: FastifyReply, path: string): Promise<FastifyReply> {
  const ready = gateway.registry.snapshot().nodes.filter(node => usable(node, 'decode'))
  const node = byLoad(ready.filter(({ role }) => role === 'hybrid'))[0] ?? byLoad(ready.filter(({ role }) => role === 'decode'))[0]
  if (gateway.draining) return sendError(request, reply, epdError('EPD_ERR_CLOSING'))
  if (node === undefined) return sendError(request, reply, epdError('EPD_ERR_NO_NODE', ['*']))
  const { timeouts } = gateway.options
  const scope = new CallScope(gateway.deadlines, performance.now() + timeouts.answer)
  const inFlight: Cancellable = { cancel: reason => { scope.abort(reason) } }
  gateway.began(inFlight)
  const client = new ClientConnection(reply.raw)
  client.addEventListener('abort', () => { scope.abort(new ClientGoneError()) })
  // A hook may have taken its time.
  if (client.aborted) scope.abort(new ClientGoneError())
  const ticket = gateway.registry.acquire(node.id, 'decode')
  try {
    const trace = upstreamContext(parentContext(request.headers))
    const headers = { ...propagationHeaders(trace, request.headers), 'x-request-id': callId(request.id) }
    const call = { signal: scope.signal, headers, dispatcher: gateway.dispatcher, log: request.log }
    const upstream = await context.with(trace, () => scope.run(() => send(node, { method: request.method as 'GET' | 'DELETE', path }, call), late => { late.destroy() }))
    const delivery = await deliver(new IdleWatch(upstream, scope, timeouts.idle), reply, {})
    ticket.end(failureOf(delivery, scope, node.id))
    return reply
  } catch (err) {
    ticket.end(scope.timedOut ? new AdapterError('UNAVAILABLE', 'no answer in time', { node: node.id, cause: err }) : err)
    const error = client.aborted ? epdError('EPD_ERR_CLIENT_CLOSED_REQUEST') : scope.timedOut ? epdError('EPD_ERR_UPSTREAM_TIMEOUT', [], { cause: err }) : err
    return sendError(request, reply, error)
  } finally {
    client.removeEventListener()
    scope.disarm()
    gateway.ended(inFlight)
  }
}

/** What the end of an answer says about its node: nothing, when it was we or the client who ended it. */
function failureOf ({ outcome, error }: Delivery, scope: CallScope, node: string): Error | undefined {
  if (outcome === 'complete') return undefined
  if (outcome === 'client_gone' || (scope.aborted && !scope.timedOut)) return new DOMException('aborted', 'AbortError')
  return new AdapterError('UNAVAILABLE', 'the answer broke off', { node, cause: error })
}
