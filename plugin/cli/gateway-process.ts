import { randomUUID } from 'node:crypto'
import type { IncomingMessage } from 'node:http'
import type { Server } from 'node:https'
import { availableParallelism } from 'node:os'
import { setFlagsFromString } from 'node:v8'
import Fastify, { LogController, type FastifyInstance, type FastifyReply, type FastifyRequest } from 'fastify'
import { REQUEST_ID_HEADER } from '../../adapters/wire/headers.ts'
import type { EmbeddedHandle } from '../embedded/index.ts'
import epd from '../index.ts'
import { logAccess } from './access-log.ts'
import { reloading } from './reload.ts'
import { keepNodes } from './state-file.ts'
import { ticking } from './terminal.ts'
import { tlsFiles, type TlsFiles } from './tls.ts'
import { epdError } from '../errors.ts'
import { sendError } from '../http/error-answer.ts'
import { resolveOptions, type EpdOptions, type ResolvedOptions } from '../options/index.ts'

export interface GatewayProcessOptions {
  /** `server` says where it listens. */
  readonly options: EpdOptions
  readonly logLevel: string
  /** Reads the configuration again, for a reload. @default there is none */
  readonly load?: () => Promise<EpdOptions>
  /** Called with lines for people while it starts. */
  readonly onProgress: (line: string) => void
}

export interface GatewayProcess {
  readonly url: string
  /** The URL with the prefix of the options. */
  readonly base: string
  /** URL of the inspection page, when it is on. */
  readonly page: string | undefined
  /** A client key of the configuration. */
  readonly apiKey: string | undefined
  readonly adminKey: string | undefined
  close (): Promise<void>
}

/** The client's own, where it is fit for logs and headers: its logs and the gateway's can then be joined. */
function requestId ({ headers }: Pick<IncomingMessage, 'headers'>): string {
  const given = headers[REQUEST_ID_HEADER]
  return typeof given === 'string' && /^[\w.:-]{1,64}$/.test(given) ? given : randomUUID()
}

function isLoopback (host: string): boolean {
  return host === 'localhost' || host === '::1' || host.startsWith('127.')
}

/** The server that every gateway of the command line has. */
export function createServer (resolved: ResolvedOptions, logLevel: string, files?: TlsFiles): FastifyInstance {
  const app = Fastify({
    ...(files === undefined ? {} : { https: files.secure }),
    // What a start needs is loaded within it: on a busy machine Kubernetes' client alone takes seconds.
    pluginTimeout: 0,
    // stdout has the URL only.
    logger: { level: resolved.logLevel ?? logLevel, stream: process.stderr },
    genReqId: requestId,
    logController: new LogController({ disableRequestLogging: true }),
    // While the gateway drains, the plugin answers with OpenAI's shape and Retry-After.
    return503OnClosing: false,
    // The schemas of our routes are checked by their tests, not by each start.
    ajv: { customOptions: { meta: false, validateSchema: false } },
    // Fastify has no limit of its own: a client that stops in the middle of its body would hold a connection for ever.
    requestTimeout: resolved.timeouts.request,
    // Base URLs are pasted with a slash too many.
    routerOptions: { ignoreDuplicateSlashes: true }
  })
  app.addHook('onRequest', (request, reply, done) => {
    reply.header(REQUEST_ID_HEADER, request.id)
    done()
  })
  const noRoute = (request: FastifyRequest, reply: FastifyReply): FastifyReply => sendError(request, reply, epdError('EPD_ERR_NO_ROUTE', [request.method, request.url.split('?', 1)[0]]))
  app.setNotFoundHandler(noRoute)
  // Fastify reads the body first, and finds fault with it.
  app.setErrorHandler((error, request, reply) => {
    if (!request.is404) throw error
    return noRoute(request, reply)
  })
  return app
}

/** For the last bytes of answers on their way, at the end. */
const LAST_BYTES_MS = 1_000

/** Clients' connections go to this server: its address, its certificates, its access log. */
export async function listen (app: FastifyInstance, { server: { host, port } }: ResolvedOptions, files?: TlsFiles): Promise<string> {
  // Requests have ended by now: the plugin's hook came first. A connection that never had one would hold the end up for a minute.
  app.addHook('preClose', async () => { setTimeout(() => { app.server.closeAllConnections() }, LAST_BYTES_MS).unref() })
  if (files !== undefined) app.addHook('onClose', files.follow(app.server as Server, app.log))
  return await app.listen({ host, port })
}

export function warnOfOpen ({ server: { host, tls }, apiKeys, keys }: ResolvedOptions, onProgress: (line: string) => void): void {
  if (!isLoopback(host) && apiKeys.length + keys.length === 0 && tls?.clientCa === undefined) onProgress(`warning: ${host} is reached from other machines, and there are no keys: whoever reaches it may use the models`)
}

/**
 * Sets V8 for a process that serves texts and streams. Call it at the start: it holds for what is compiled and collected later.
 *
 * - Streams live long, so V8 takes the objects that they share with short requests for long-lived too, and makes them in the
 *   old part of its heap. Each of them, dead, keeps what it refers to through the small collections: a text of 1 KB takes
 *   164 us of CPU so and 114 without, medians of nine processes (docs/benchmarks.md, "What streams cost the texts beside them").
 * - V8 marks its heap in threads of its own beside JavaScript. Where the process has only one core they take it from
 *   JavaScript: a body of 64 MiB then stalled requests for 18.1 ms (median of 15, the longest 28.0), and for 12.7 (20.2) when
 *   JavaScript's own thread marks, a little at a time.
 *
 * An application of its own does the same by these flags of `node`, the second on one core only.
 */
export function tuneV8 (): void {
  setFlagsFromString('--no-allocation-site-pretenuring')
  if (availableParallelism() === 1) setFlagsFromString('--no-concurrent-marking')
}

/**
 * The gateway as a program: Fastify, the plugin and, if configured, embedded engines. Resolves when it is ready for requests: with embedded engines, when all of them are up.
 */
export async function startGateway ({ options, logLevel, load, onProgress }: GatewayProcessOptions): Promise<GatewayProcess> {
  tuneV8()
  const resolved = resolveOptions(options)
  const ui = withPage(options)
  const files = resolved.server.tls === undefined ? undefined : tlsFiles(resolved.server.tls)
  const app = createServer(resolved, logLevel, files)
  try {
    if (resolved.server.accessLog) logAccess(app, resolved.prefix)
    await app.register(epd, { ...options, ui })
    if (load !== undefined) await app.register(reloading, { prefix: resolved.prefix, gateway: app.epd.gateway, load: async () => ({ ui, ...await load() }) })
    if (resolved.server.stateFile !== undefined) app.addHook('onClose', keepNodes(resolved.server.stateFile, app.epd.gateway))
    const url = await listen(app, resolved, files)
    warnOfOpen(resolved, onProgress)
    await embeddedReady(app.epd.embedded, onProgress)
    return processOf(resolved, url, ui, async () => { await app.close() })
  } catch (err) {
    await app.close()
    throw err
  }
}

/** Is the inspection page on? */
export function withPage ({ ui, server }: EpdOptions): boolean {
  return ui ?? isLoopback(server?.host ?? '127.0.0.1')
}

export function processOf ({ prefix, apiKeys, adminKey }: ResolvedOptions, url: string, ui: boolean, close: () => Promise<void>): GatewayProcess {
  const base = url + prefix
  return { url, base, page: ui ? `${base}/epd/` : undefined, apiKey: apiKeys[0], adminKey, close }
}

export async function embeddedReady (embedded: Pick<EmbeddedHandle, 'ready' | 'progress'> | undefined, onProgress: (line: string) => void): Promise<void> {
  if (embedded === undefined) return
  const started = performance.now()
  onProgress('starting the embedded engines')
  const done = ticking(seconds => {
    const { up, of } = embedded.progress()
    return up < of ? `loading models: ${up} of ${of} engines are up, ${seconds} s` : `linking the engines, ${seconds} s`
  })
  await embedded.ready.finally(done)
  onProgress(`embedded engines are up after ${((performance.now() - started) / 1000).toFixed(1)} s`)
}
