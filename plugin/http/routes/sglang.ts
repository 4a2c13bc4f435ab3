import type { FastifyPluginAsync, FastifyReply, FastifyRequest } from 'fastify'
import { AdapterError } from '../../../adapters/adapter.ts'
import type { JsonAnswer } from '../../../adapters/http/json.ts'
import { readEncode } from '../../../adapters/sglang/encoder.ts'
import { VIRTUAL_PATH } from '../../../adapters/sglang/info.ts'
import { isObject, textOf } from '../../../adapters/wire/json.ts'
import { parseJson } from '../../../adapters/http/failures.ts'
import { toEpdError } from '../../errors.ts'
import { onClientGone } from '../client.ts'
import { onRouteError } from '../error-answer.ts'
import type { Gateway } from '../../gateway.ts'
import { StandIn } from '../../sglang/stand-in.ts'
import { requireOperator } from './guard.ts'

export interface SglangRoutesOptions {
  readonly gateway: Gateway
}

/**
 * SGLang's encoder registry (EncoderBootstrapServer) with its shapes and texts, so that encoders started with
 * `--encoder-register-urls` join the gateway. An encoder registers before it listens, once, and leaves at its end.
 */
export const sglangRoutes: FastifyPluginAsync<SglangRoutesOptions> = async function sglangRoutes (app, { gateway }) {
  const { registry } = gateway
  app.setErrorHandler(onRouteError)
  app.addHook('onRequest', requireOperator(gateway))
  // JSON only: a page of another site can post text to loopback without a CORS preflight, but not JSON.
  app.removeContentTypeParser('text/plain')

  app.post('/register_encoder_url', async (request, reply) => {
    const url = urlOf(request.body)
    if (url === undefined) return refuse(reply, "Missing or empty 'url' field")
    try {
      registry.add({ url, role: 'encoder', adapter: 'sglang' }, { peer: request.ip })
    } catch (err) {
      if (!(err instanceof TypeError)) throw err
      request.log.warn({ err }, 'an encoder could not be added')
      return refuse(reply, err.message)
    }
    return reply.type('text/plain').send('OK')
  })

  app.delete('/unregister_encoder_url', async (request, reply) => {
    const url = urlOf(request.body)
    if (url === undefined) return refuse(reply, "Missing or empty 'url' field")
    const node = registry.get(url)
    // Other nodes are not an encoder's to remove.
    if (node?.role === 'encoder' && node.adapter.name === 'sglang') registry.remove(url)
    return reply.type('text/plain').send('OK')
  })

  app.get('/list_encoder_urls', async () => ({
    encoder_urls: registry.snapshot().nodes.filter(node => node.role === 'encoder' && node.adapter.name === 'sglang' && node.state !== 'unhealthy').map(node => node.id)
  }))

  await app.register(virtualEncoders, { gateway })
}

/** `/sglang/v/:n`: what a language server sees in place of encoders. */
const virtualEncoders: FastifyPluginAsync<SglangRoutesOptions> = async function virtualEncoders (app, { gateway }) {
  const standIn = new StandIn(gateway)
  // The encoder gets the bytes as they came.
  app.removeAllContentTypeParsers()
  app.addContentTypeParser('application/json', { parseAs: 'buffer', bodyLimit: gateway.options.limits.body }, (_request, body, done) => { done(null, body) })
  const path = `${VIRTUAL_PATH}:n`
  const onGone = (reply: FastifyReply) => (listener: () => void) => { onClientGone(reply.raw, listener) }

  // Encoders may all be gone: a language server would take the address off its list, and encode by itself without a word.
  app.get(`${path}/health`, { logLevel: 'warn' }, async (_request, reply) => reply.type('text/plain').send('OK'))

  app.post(`${path}/encode`, async (request, reply) => {
    const bytes = request.body as Buffer
    const encode = readEncode(parseJson(bytes))
    if (typeof encode === 'string') return fail(reply, 400, encode, idOf(request))
    return await relay(request, reply, standIn.encode(encode, bytes, onGone(reply)))
  })

  app.post(`${path}/scheduler_receive_url`, async (request, reply) => {
    const body = parseJson(request.body as Buffer)
    const id = idOf(request)
    if (id === null || !isObject(body) || textOf(body.receive_url) === undefined) return fail(reply, 400, 'missing or invalid req_id or receive_url', id)
    standIn.receive({ ...body, req_id: id, receive_url: textOf(body.receive_url)! })
    return reply.type('application/json').send('null')
  })

  for (const call of ['/scheduler_receive_meta_data', '/send'] as const) {
    app.post(path + call, async (request, reply) => {
      const body = parseJson(request.body as Buffer)
      const id = idOf(request)
      if (id === null || !isObject(body)) return fail(reply, 400, 'missing or invalid req_id', id)
      return await relay(request, reply, standIn.ask(call, { ...body, req_id: id }, onGone(reply)))
    })
  }
}

function idOf ({ body }: FastifyRequest): string | null {
  const parsed = parseJson(body as Buffer)
  const id = isObject(parsed) ? textOf(parsed.req_id) : undefined
  return id === undefined || id === '' ? null : id
}

async function relay (request: FastifyRequest, reply: FastifyReply, answer: Promise<JsonAnswer>): Promise<FastifyReply> {
  try {
    const { statusCode, body } = await answer
    return reply.code(statusCode).type('application/json').send(JSON.stringify(body ?? null))
  } catch (err) {
    const status = AdapterError.is(err) ? { REJECTED: 400, BUSY: 503 }[err.code as string] ?? 502 : toEpdError(err).statusCode
    const about = { part: idOf(request), reason: (err as Error).message }
    if (status === 499) request.log.info(about, 'a language server has closed its call')
    else request.log.error(about, 'a part of a language server\'s request could not be encoded')
    return fail(reply, status, (err as Error).message, idOf(request))
  }
}

function fail (reply: FastifyReply, code: number, message: string, id: string | null): FastifyReply {
  return reply.code(code).send({ status: 'error', message, req_id: id })
}

function urlOf (body: unknown): string | undefined {
  const url = (body as { url?: unknown } | null | undefined)?.url
  return typeof url === 'string' && url !== '' ? url : undefined
}

function refuse (reply: FastifyReply, error: string): FastifyReply {
  return reply.code(400).send({ error })
}
