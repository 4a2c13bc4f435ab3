import type { FastifyPluginAsync, FastifyReply } from 'fastify'
import { onRouteError } from '../error-answer.ts'
import type { Gateway } from '../../gateway.ts'
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
  app.addHook('onRequest', requireOperator(gateway.options))
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
}

function urlOf (body: unknown): string | undefined {
  const url = (body as { url?: unknown } | null | undefined)?.url
  return typeof url === 'string' && url !== '' ? url : undefined
}

function refuse (reply: FastifyReply, error: string): FastifyReply {
  return reply.code(400).send({ error })
}
