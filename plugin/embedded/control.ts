import Fastify, { LogController, type FastifyBaseLogger } from 'fastify'
import type { Gateway } from '../gateway.ts'
import { nodeRoutes } from '../http/routes/nodes.ts'
import { traceRoutes } from '../http/routes/traces.ts'
import type { RegistrySnapshot } from '../registry/index.ts'
import type { TraceStore } from '../traces/trace-store.ts'
import { startEmbedded, type Embedded } from './index.ts'

/** The embedded engines of a plugin instance. */
export interface EmbeddedHandle {
  /** All engines are up, healthy and linked; rejects when one can't be started. Pends until the application listens. */
  readonly ready: Promise<void>
  pids (): number[]
  close (): Promise<void>
}

export interface EmbeddedControl extends EmbeddedHandle {
  start (): void
}

interface Init {
  readonly gateway: Gateway
  readonly log: FastifyBaseLogger
  readonly store: TraceStore | undefined
}

/**
 * Starts the embedded engines when told to. They register over HTTP like any node, but at a loopback listener of their
 * own: the application's authentication, rate limits, prefix or TLS can't stand in their way.
 */
export function embeddedControl ({ gateway, log, store }: Init): EmbeddedControl {
  const config = gateway.options.embedded!
  const server = Fastify({ loggerInstance: log, logController: new LogController({ disableRequestLogging: true }) })
  const urls = new Map<string, string>()
  const ending = new AbortController()
  let engines: Embedded | undefined
  let started: Promise<void> | undefined
  let closing: Promise<void> | undefined
  let settle!: { resolve: () => void, reject: (err: unknown) => void }
  const ready = new Promise<void>((resolve, reject) => { settle = { resolve, reject } })
  ready.catch(() => {})

  async function run (): Promise<void> {
    await server.register(nodeRoutes, { gateway })
    if (store !== undefined) await server.register(traceRoutes, { store, isNodeToken: token => gateway.registry.isNodeToken(token), onSpan: span => { gateway.noteSpan(span) } })
    const proxyUrl = await server.listen({ host: '127.0.0.1', port: 0 })
    if (closing !== undefined) return
    engines = startEmbedded({ config, proxyUrl, log, onUp })
    await engines.ready
    await gateway.registry.waitFor(snapshot => inService(snapshot, [...urls.values()]), { signal: ending.signal })
  }

  function onUp (engine: string, url: string): void {
    log.info({ engine, url }, 'embedded engine is up')
    const old = urls.get(engine)
    urls.set(engine, url)
    // It has died, and its successor has another port: nobody will ever answer there again.
    if (old !== undefined && old !== url) gateway.registry.remove(old)
  }

  async function stop (): Promise<void> {
    await started?.catch(() => {})
    await engines?.close()
    await server.close()
  }

  return {
    ready,
    pids: () => engines?.pids() ?? [],
    start () {
      started ??= run()
      started.then(settle.resolve, (err: unknown) => {
        log.error({ err }, 'embedded engines did not start')
        settle.reject(err)
      })
    },
    async close () {
      // Engines still starting are ended too: waiting for them first could take long.
      ending.abort(new Error('the embedded engines are closed'))
      closing ??= engines === undefined ? stop() : engines.close().then(stop)
      await closing
    }
  }
}

/** Have all of them registered, been probed and been linked to each other? */
function inService (snapshot: RegistrySnapshot, urls: readonly string[]): boolean {
  const nodes = urls.map(url => snapshot.byId.get(url))
  return nodes.every(node => node?.state === 'healthy' && [...node.links.values()].every(link => link.state !== 'linking' && link.state !== 'none'))
}
