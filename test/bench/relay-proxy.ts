/** The proxies that are compared, one a process: `relay-proxy.js UPSTREAM_PORT KIND [untuned]`. */
import replyFrom from '@fastify/reply-from'
import Fastify from 'fastify'
import type { FastifyInstance, FastifyReply } from 'fastify'
import { Agent } from 'undici'
import type { AddressInfo } from 'node:net'
import { TimeLimit } from '../../adapters/abort.ts'
import { postStream } from '../../adapters/http.ts'
import { tuneV8 } from '../../plugin/cli/gateway-process.ts'
import epd from '../../plugin/index.ts'
import { parseBody, readBody } from '../../plugin/body/index.ts'
import { deliver, onClientGone } from '../../plugin/http/client.ts'
import { beginAnswer } from '../../plugin/pipeline/index.ts'
import { until } from '../helper/until.ts'
import { serve } from './processes.ts'

const [port = '0', kind = 'bare', v8] = process.argv.slice(2)
// As `fastify-epd serve` does.
if (v8 !== 'untuned') tuneV8()
const origin = `http://127.0.0.1:${port}`
const PATH = '/v1/chat/completions'
const LIMIT = 64 << 20
const NOTHING = (): void => {}

/** A plain relay by hand: Fastify parses the body, JSON.stringify, undici's dispatch with a handler of its own, a hijacked reply. */
function bare (app: FastifyInstance): void {
  const agent = new Agent()
  const forward = (path: string, body: unknown, reply: FastifyReply): void => {
    reply.hijack()
    const { raw } = reply
    let abort: (() => void) | undefined
    raw.on('close', () => { if (!raw.writableEnded) abort?.() })
    agent.dispatch({ origin, path, method: 'POST', headers: { 'content-type': 'application/json' }, body: JSON.stringify(body), headersTimeout: 0, bodyTimeout: 0 }, {
      onRequestStart: controller => { abort = () => controller.abort(new Error('gone')) },
      onResponseStart: (_, statusCode, { connection: _connection, 'keep-alive': _keepAlive, 'transfer-encoding': _encoding, ...headers }) => {
        raw.writeHead(statusCode, headers)
      },
      onResponseData: (controller, chunk) => {
        if (raw.write(chunk)) return
        controller.pause()
        raw.once('drain', () => controller.resume())
      },
      onResponseEnd: () => { raw.end() },
      onResponseError: () => { raw.destroy() }
    })
  }
  app.post(PATH, (request, reply) => forward(PATH, request.body, reply))
}

/** This package's body and relay, without plan, registry and traces. */
function parts (app: FastifyInstance): void {
  const dispatcher = new Agent()
  const node = { id: origin, url: origin, role: 'hybrid' as const }
  const log = { debug: NOTHING, info: NOTHING, warn: NOTHING, error: NOTHING }
  app.removeAllContentTypeParsers()
  app.addContentTypeParser('*', (_request, _payload, done) => done(null))
  app.post(PATH, async (request, reply) => {
    const body = await parseBody(await readBody(request.raw, { limit: LIMIT }))
    const limit = new TimeLimit(0)
    onClientGone(reply.raw, () => { limit.abort(new Error('gone')) })
    const call = { signal: limit, headers: { 'x-request-id': request.id }, dispatcher, log }
    const answer = await beginAnswer(origin, await postStream(node, { path: PATH, body: body.splice({}) }, call), limit, 60_000)
    deliver(answer, reply, { 'x-epd-plan': 'pd' })
    await answer.delivered
    return reply
  })
}

const app = Fastify({ bodyLimit: LIMIT, forceCloseConnections: true })
if (kind === 'bare') bare(app)
else if (kind === 'parts') parts(app)
else if (kind === 'plugin') await app.register(epd, { nodes: [{ url: origin, role: 'hybrid', adapter: 'openai' }], telemetry: { traces: false } })
else if (kind === 'reply-from') {
  await app.register(replyFrom, { base: origin })
  app.post(PATH, (_request, reply) => { reply.from(PATH) })
}
await app.listen({ port: 0, host: '127.0.0.1' })

if (kind === 'plugin') await until(() => app.epd.nodes.snapshot().models.length > 0, 'the node is known')

let since = process.cpuUsage()
serve({
  port: () => (app.server.address() as AddressInfo).port,
  /** CPU time since the last call, in microseconds, user and system. */
  cpu: () => {
    const used = process.cpuUsage(since)
    since = process.cpuUsage()
    return used.user + used.system
  },
  memory: () => process.memoryUsage.rss(),
  exit: () => process.exit(),
  pid: () => process.pid
})
