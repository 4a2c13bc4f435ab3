/** What operators ask goes on to the primary, whichever worker has taken the connection. */
import { request as ask, type ClientRequest, type IncomingHttpHeaders, type IncomingMessage } from 'node:http'
import type { FastifyInstance, FastifyReply, FastifyRequest } from 'fastify'
import { REQUEST_ID_HEADER } from '../../../adapters/wire/headers.ts'
import { epdError, toReply } from '../../errors.ts'
import { onClosed } from '../../http/client.ts'

/** The client's address, which the primary's guards must see in place of the worker's. */
const CLIENT_HEADER = 'x-epd-client-address'
/** Of one connection. */
const NOT_PASSED: ReadonlySet<string> = new Set(['connection', 'keep-alive', 'proxy-connection', 'transfer-encoding', 'expect', 'upgrade', 'te', 'trailer', CLIENT_HEADER])

/** In a worker: register it before the plugin. @param socket where the primary listens */
export function passToPrimary (app: FastifyInstance, prefix: string, socket: string): void {
  const streams = new Set<ClientRequest>()
  app.addHook('onRequest', (request, reply, done) => {
    const path = request.url.replace(/^https?:\/\/[^/?#]*/i, '').replace(/\/{2,}/g, '/')
    if (path.startsWith(prefix) && /^\/(metrics|nodes|epd|instances|distserve|register_encoder_url|unregister_encoder_url|list_encoder_urls)(?=[/?]|$)/.test(path.slice(prefix.length))) {
      const upstream = passTo(socket, path, request, reply)
      streams.add(upstream)
      upstream.once('close', () => { streams.delete(upstream) })
    } else done()
  })
  // The page's feed never ends by itself.
  app.addHook('preClose', async () => { for (const stream of streams) stream.destroy() })
}

/** Has another process of this gateway answer. @param body where it has been read already */
export function passTo (socketPath: string, path: string, request: FastifyRequest, reply: FastifyReply, body?: Buffer): ClientRequest {
  const headers = Object.fromEntries(Object.entries(request.headers).filter(([name]) => !NOT_PASSED.has(name)))
  const upstream = ask({
    socketPath,
    method: request.method,
    path,
    headers: { ...headers, connection: 'keep-alive', [REQUEST_ID_HEADER]: request.id, [CLIENT_HEADER]: request.ip },
    agent: false
  })
  reply.hijack()
  const { raw } = reply
  onClosed(raw, () => { upstream.destroy() })
  upstream.once('response', answer => {
    raw.writeHead(answer.statusCode!, withoutHop(answer.headers))
    answer.pipe(raw)
    answer.once('end', () => { upstream.destroy() })
    answer.once('error', () => { raw.destroy() })
  })
  upstream.once('close', () => {
    if (raw.headersSent && !raw.writableEnded) raw.end()
  })
  upstream.once('error', err => {
    if (raw.headersSent || raw.destroyed) { raw.destroy(); return }
    request.log.error({ err }, 'another process of this gateway did not answer')
    const { statusCode, contentType, headers, body } = toReply(epdError('EPD_ERR_CLOSING'))
    raw.writeHead(statusCode, { ...headers, 'content-type': contentType }).end(body)
  })
  if (body === undefined) request.raw.pipe(upstream)
  else upstream.end(body)
  return upstream
}

function withoutHop (headers: IncomingHttpHeaders): IncomingHttpHeaders {
  return Object.fromEntries(Object.entries(headers).filter(([name]) => !NOT_PASSED.has(name)))
}

/** In the primary: register it before the plugin. Only workers reach its socket. */
export function fromWorkers (app: FastifyInstance): void {
  // A body may be refused before it is whole. If that closed the connection, the worker could write no more, and would lose the answer.
  app.addHook('onSend', (_request, reply, _payload, done) => {
    reply.header('connection', 'keep-alive')
    done()
  })
  app.addHook('onRequest', (request, _reply, done) => {
    fromWorker(request.raw)
    done()
  })
}

/** Gives a request that another process has passed on its client's address. */
export function fromWorker ({ headers, socket }: IncomingMessage): void {
  const address = headers[CLIENT_HEADER]
  delete headers[CLIENT_HEADER]
  // One connection carries one request: `request.ip` is read from here.
  Object.defineProperty(socket, 'remoteAddress', { value: address, configurable: true })
}
