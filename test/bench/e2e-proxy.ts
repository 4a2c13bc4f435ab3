/**
 * The gateways that are compared, one a process: `e2e-proxy.js KIND PD_URL ENCODER_URL...`. `relay` is a plain
 * relay with undici that never reads a body: a Buffer in, the same Buffer out.
 */
import type { AddressInfo } from 'node:net'
import * as api from '@opentelemetry/api'
import { monitorEventLoopDelay } from 'node:perf_hooks'
import { setTimeout as pause } from 'node:timers/promises'
import { setFlagsFromString } from 'node:v8'
import { runInNewContext } from 'node:vm'
import Fastify, { type FastifyInstance } from 'fastify'
import { Agent } from 'undici'
import { tuneV8 } from '../../plugin/cli/gateway-process.ts'
import epd from '../../plugin/index.ts'
import { until } from '../helper/until.ts'
import { memory, resetPeak } from './memory.ts'
import { serve } from './processes.ts'

const [kind = 'relay', pd = '', ...encoders] = process.argv.slice(2)
const PATH = '/v1/chat/completions'
const LIMIT = 80 << 20

// As `fastify-epd serve` does.
if (kind !== 'relay') tuneV8()

function relay (app: FastifyInstance): void {
  const agent = new Agent()
  app.removeAllContentTypeParsers()
  app.addContentTypeParser('*', { parseAs: 'buffer' }, (_request, body, done) => { done(null, body) })
  app.post(PATH, (request, reply) => {
    reply.hijack()
    const { raw } = reply
    let abort: (() => void) | undefined
    raw.on('close', () => { if (!raw.writableEnded) abort?.() })
    agent.dispatch({ origin: pd, path: PATH, method: 'POST', headers: { 'content-type': 'application/json' }, body: request.body as Buffer, headersTimeout: 0, bodyTimeout: 0 }, {
      onRequestStart: controller => { abort = () => controller.abort(new Error('gone')) },
      onResponseStart: (_, statusCode, headers) => { raw.writeHead(statusCode, { 'content-type': headers['content-type'] as string }) },
      onResponseData: (controller, chunk) => {
        if (raw.write(chunk)) return
        controller.pause()
        raw.once('drain', () => controller.resume())
      },
      onResponseEnd: () => { raw.end() },
      onResponseError: () => { raw.destroy() }
    })
  })
}

/** In the place of an application's SDK a provider that records nothing switches tracing off. */
function trace (on: boolean): void {
  if (on) api.trace.disable()
  else api.trace.setGlobalTracerProvider({ getTracer: () => new api.ProxyTracerProvider().getTracer('') })
}

async function gateway (app: FastifyInstance): Promise<void> {
  const nodes = [...encoders.map(url => ({ url, role: 'encoder' as const })), { url: pd, role: 'hybrid' as const }]
  await app.register(epd, { nodes, bypass: 'never', limits: { body: LIMIT } })
}

/** Real engines; the second route never bypasses the encoder. */
async function engines (app: FastifyInstance): Promise<void> {
  await app.register(epd, { embedded: { encoders: 1, engines: 1 }, bypass: 'auto', routing: { smallItem: 4096 }, limits: { body: LIMIT } })
  app.post('/never', async (request, reply) => await app.epd.handle(request, reply, { overrides: { bypass: 'never', path: PATH } }))
}

const app = Fastify({ bodyLimit: LIMIT, forceCloseConnections: true })
if (kind === 'relay') relay(app)
else if (kind === 'engines') await engines(app)
else await gateway(app)
await app.listen({ port: 0, host: '127.0.0.1' })
if (kind === 'engines') await app.epd.embedded!.ready
if (kind !== 'relay') {
  await until(() => {
    const { nodes, link } = app.epd.nodes.snapshot()
    const consumer = nodes.find(node => node.role === 'hybrid')
    return consumer !== undefined && nodes.every(node => node.state === 'healthy' && (node === consumer || link(node.id, consumer.id) === 'linked'))
  }, 'all nodes are up and linked', 60_000)
}

setFlagsFromString('--expose-gc')
const collect = runInNewContext('gc') as () => void
// Measured by telemetry-whole.ts alone.
trace(false)
const delay = monitorEventLoopDelay({ resolution: 1 })
let resting = 0
let since = process.cpuUsage()
serve({
  port: () => (app.server.address() as AddressInfo).port,
  engine: () => app.epd.nodes.snapshot().nodes.find(node => node.role === 'hybrid')!.id,
  /** CPU time since the last call, in microseconds, user and system. */
  cpu: () => {
    const used = process.cpuUsage(since)
    since = process.cpuUsage()
    return used.user + used.system
  },
  /** Switches tracing on or off. */
  trace,
  /** Resident memory in bytes, with nothing left to collect. */
  memory: () => {
    collect()
    collect()
    return process.memoryUsage.rss()
  },
  /** Begins to watch the event loop and memory. */
  watch: async () => {
    // Memory that is collected is given back a little later, by other threads.
    for (let n = 0; n < 3; n++) {
      collect()
      await pause(200)
    }
    resting = memory('VmRSS')
    resetPeak()
    delay.enable()
    delay.reset()
  },
  /** Since `watch`: the longest time the event loop was blocked, in ms, and the most memory above that of then, in bytes. */
  watched: () => {
    delay.disable()
    return { stallMs: delay.max / 1e6, bytes: memory('VmHWM') - resting }
  },
  stop: async () => { await app.close() },
  exit: () => process.exit()
})
