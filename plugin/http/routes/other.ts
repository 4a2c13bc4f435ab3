/** Routes below /v1 that the gateway passes on without planning: GET, DELETE, forms, and a POST that names no model. */
import type { IncomingMessage } from 'node:http'
import { context } from '@opentelemetry/api'
import type { FastifyPluginAsync, FastifyReply, FastifyRequest } from 'fastify'
import { abortable, TimeLimit } from '../../../adapters/abort.ts'
import { AdapterError, type Role } from '../../../adapters/adapter.ts'
import { send } from '../../../adapters/http.ts'
import { REQUEST_ID_HEADER } from '../../../adapters/wire/headers.ts'
import { parseBody, readBody, type Body } from '../../body/index.ts'
import { epdError } from '../../errors.ts'
import type { Gateway } from '../../gateway.ts'
import { beginAnswer, verdictOn, type Cancellable, type Delivery, type Served } from '../../pipeline/index.ts'
import { ANSWER_TOKENS } from '../../planning/index.ts'
import { usableOf, type NodeSnapshot } from '../../registry/index.ts'
import { parentContext, propagationHeaders } from '../../telemetry/propagation.ts'
import { deliver, onClientGone } from '../client.ts'
import { sendError } from '../error-answer.ts'
import { callId, kHolder, watched, type Held, type Handle } from '../handle.ts'
import { plainPath, upstreamPath } from '../upstream-path.ts'
import { formField } from './form.ts'

export interface OtherRoutesOptions {
  readonly gateway: Gateway
  readonly handle: Handle
  /** Length of the prefix in front of /v1. */
  readonly below: number
}

/** The body of a request that is passed on as it came. */
interface Passed {
  readonly path: string
  /** Undefined: any node will do. */
  readonly model?: string | undefined
  readonly chunks?: readonly Buffer[]
  readonly contentType?: string | undefined
}

/** Routes whose prompts the gateway plans. */
const PLANNED = /^\/(v1\/((chat\/)?completions|responses|messages)|pooling)\/?$/i

/** What vLLM and SGLang serve beside /v1. */
export const BESIDE_V1 = ['/tokenize', '/detokenize', '/score', '/rerank', '/v2/rerank', '/pooling'] as const

/** Proxies' clients write the whole URL. */
const ORIGIN = /^https?:\/\/[^/?#]*/i

export const otherRoutes: FastifyPluginAsync<OtherRoutesOptions> = async function otherRoutes (app, { gateway, handle, below }) {
  const { limits } = gateway.options
  app.addContentTypeParser('multipart/form-data', { bodyLimit: limits.body }, async (_request: unknown, payload: IncomingMessage) => await readBody(payload, { limit: limits.body }))
  const pathOf = (request: FastifyRequest): string => upstreamPath(request.url.replace(ORIGIN, '').slice(below))

  const passOn = async (request: FastifyRequest, reply: FastifyReply, passed: Passed, body?: Body): Promise<FastifyReply> => {
    const { delivery, error } = body === undefined ? await forward(gateway, request, reply, passed) : await watched(request, body, async () => await forward(gateway, request, reply, passed))
    return delivery === undefined ? sendError(request, reply, error) : reply
  }

  app.route({ method: ['GET', 'DELETE'], url: '/v1/*', handler: async (request, reply) => await passOn(request, reply, { path: pathOf(request) }) })

  const pass = async (request: FastifyRequest, reply: FastifyReply): Promise<FastifyReply> => {
    const path = pathOf(request)
    const bytes = request.body as Buffer | undefined
    const contentType = request.headers['content-type']
    if (bytes === undefined || bytes.length === 0) return await passOn(request, reply, { path })
    if (/^multipart\//i.test(contentType ?? '')) return await passOn(request, reply, { path, model: formField(bytes, contentType!, 'model'), chunks: [bytes], contentType })
    let body: Body
    try {
      body = await parseBody(bytes, true)
      if (body.model === '') checkNameless(request, body, path)
    } catch (err) {
      return sendError(request, reply, err)
    }
    return body.model === '' ? await passOn(request, reply, { path, chunks: body.splice({}) }, body) : await handle(request, reply, { body, overrides: { path } })
  }
  // An application may have routes of these names.
  for (const url of ['/v1/*', ...BESIDE_V1]) if (!app.hasRoute({ method: 'POST', url: app.prefix + url })) app.post(url, pass)
}

/** Hands a request to a healthy node, and its answer back, errors included. */
async function forward (gateway: Gateway, request: FastifyRequest, reply: FastifyReply, { path, model, chunks, contentType }: Passed): Promise<Served> {
  if (gateway.draining) return { error: epdError('EPD_ERR_CLOSING'), headers: {} }
  let node: NodeSnapshot
  let via: Record<string, string>
  try {
    via = gateway.via(request.headers)
    checkModel(request, model)
    node = nodeFor(gateway, model)
  } catch (error) {
    return { error, headers: {} }
  }
  const { timeouts } = gateway.options
  const limit = new TimeLimit(timeouts.answer)
  onClientGone(reply.raw, () => { limit.abort(epdError('EPD_ERR_CLIENT_CLOSED_REQUEST')) })
  const inFlight: Cancellable = { cancel: reason => { limit.abort(reason) } }
  gateway.requests.add(inFlight)
  const ticket = gateway.registry.acquire(node.id, 'decode', 0, ANSWER_TOKENS)
  try {
    const trace = parentContext(request.headers)
    const headers = { ...propagationHeaders(trace, request.headers), [REQUEST_ID_HEADER]: callId(request.id), ...via }
    const call = { signal: limit, headers, dispatcher: gateway.dispatcher, log: request.log }
    const upstream = await context.with(trace, () => abortable(send(node, { method: request.method as 'GET' | 'POST' | 'DELETE', path, body: chunks, contentType }, call), limit))
    const answer = await beginAnswer(node.id, upstream, limit, timeouts.idle)
    deliver(answer, reply, {})
    const delivery = await answer.delivered
    const failure = failureOf(delivery, limit, node.id)
    if (failure === undefined) ticket.end()
    else ticket.end(failure, verdictOn(failure, 'decode'))
    return { delivery, headers: {} }
  } catch (err) {
    const failure = limit.timedOut ? new AdapterError('UNAVAILABLE', 'no answer in time', { node: node.id, cause: err, how: 'late' }) : err
    ticket.end(failure, verdictOn(failure, 'decode'))
    return { error: limit.timedOut ? epdError('EPD_ERR_UPSTREAM_TIMEOUT', [], { cause: err }) : err, headers: {} }
  } finally {
    limit.clear()
    gateway.requests.delete(inFlight)
  }
}

/** Pictures, and what some nodes only may take, go to a node that is chosen for them. @throws EPD_ERR_MISSING_VALUE */
function checkNameless (request: FastifyRequest & Held, { media, privileged }: Body, path: string): void {
  const judged = media.length > 0 || privileged.some(({ kind }) => kind !== 'control')
  if (judged || PLANNED.test(plainPath(path)) || request[kHolder]?.models !== undefined) throw epdError('EPD_ERR_MISSING_VALUE', ['model'], { param: 'model' })
}

/** A key that has a list of models names one of them in what it sends. @throws EPD_ERR_MODEL_NOT_FOUND, EPD_ERR_MISSING_VALUE */
function checkModel (request: FastifyRequest & Held, model: string | undefined): void {
  const models = request[kHolder]?.models
  if (models === undefined || request.method !== 'POST') return
  if (model === undefined) throw epdError('EPD_ERR_MISSING_VALUE', ['model'], { param: 'model' })
  if (!models.includes(model)) throw epdError('EPD_ERR_MODEL_NOT_FOUND', [model], { param: 'model' })
}

/** @throws EPD_ERR_MODEL_NOT_FOUND, EPD_ERR_NO_NODE */
function nodeFor (gateway: Gateway, model: string | undefined): NodeSnapshot {
  if (model !== undefined && !gateway.serves(model)) throw epdError('EPD_ERR_MODEL_NOT_FOUND', [model], { param: 'model' })
  const ofRole = (wanted: Role): readonly NodeSnapshot[] => {
    const nodes = gateway.registry.snapshot().nodes.filter(({ role, models }) => role === wanted && (model === undefined || models.includes(model)))
    return usableOf(nodes, 'decode', gateway.options.routing.panicThreshold)
  }
  const node = leastBusy(ofRole('hybrid')) ?? leastBusy(ofRole('decode'))
  if (node === undefined) throw epdError('EPD_ERR_NO_NODE', [model ?? '*'])
  return node
}

/** Of idle ones the first: it has what such requests ask for, files and earlier responses, when others went to it. */
function leastBusy (nodes: readonly NodeSnapshot[]): NodeSnapshot | undefined {
  return [...nodes].sort((a, b) => a.load.work / a.speed - b.load.work / b.speed)[0]
}

/** What the end of an answer says about its node: nothing, when the client or the gateway ended it. */
function failureOf ({ outcome, error, how }: Delivery, limit: TimeLimit, node: string): Error | undefined {
  if (outcome === 'complete') return undefined
  if (outcome === 'client_gone' || (limit.aborted && !limit.timedOut)) return new DOMException('aborted', 'AbortError')
  return new AdapterError('UNAVAILABLE', 'the answer broke off', { node, cause: error, how })
}
