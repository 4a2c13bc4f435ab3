/**
 * The embedded engines of a plugin instance: our own engines as child processes. They register over HTTP like any other
 * node, so the gateway has no second path for them.
 */
import Fastify, { LogController, type FastifyBaseLogger } from 'fastify'
import type { Gateway } from '../gateway.ts'
import { nodeRoutes } from '../http/routes/nodes.ts'
import { spanRoutes } from '../http/routes/spans.ts'
import type { RegistrySnapshot } from '../registry/index.ts'
import { hindrance, superviseEngines, type Supervisor } from './supervisor.ts'

export interface EmbeddedHandle {
  /** Resolves when all engines are up, healthy and linked; rejects when one can't be started. Pends until the application listens. */
  readonly ready: Promise<void>
  /** How many engines have been up, and how many there are to be. */
  progress (): { readonly up: number, readonly of: number }
  pids (): number[]
  /** Why they did not start; undefined while they may, and when they have. */
  problem (): string | undefined
  close (): Promise<void>
}

export interface EmbeddedControl extends EmbeddedHandle {
  start (): void
}

interface Init {
  readonly gateway: Gateway
  readonly log: FastifyBaseLogger
}

/**
 * Starts the engines with `start()`. They register at a loopback listener of their own, because the application's
 * authentication, rate limits, prefix or TLS could reject them.
 */
export function embeddedControl ({ gateway, log }: Init): EmbeddedControl {
  const config = gateway.options.embedded!
  const server = Fastify({ loggerInstance: log, logController: new LogController({ disableRequestLogging: true }) })
  const urls = new Map<string, string>()
  const ending = new AbortController()
  let supervisor: Supervisor | undefined
  let started: Promise<void> | undefined
  let closed: Promise<void> | undefined
  let problem: string | undefined
  let start!: () => void
  const ready = new Promise<void>(resolve => { start = () => { resolve(started ??= run()) } })
  ready.catch((err: unknown) => {
    problem ??= 'the embedded engines did not start: the log says why'
    log.error({ err }, 'embedded engines did not start')
  })

  async function run (): Promise<void> {
    const { why, folder } = hindrance(config) ?? {}
    // Whoever asks /readyz need not know the folders of this machine.
    problem = why
    if (why !== undefined) throw new Error(folder === undefined ? why : `${why}: ${folder}`)
    await server.register(nodeRoutes, { gateway, transient: true })
    await server.register(spanRoutes, { gateway })
    const proxyUrl = await server.listen({ host: '127.0.0.1', port: 0 })
    if (ending.signal.aborted) return
    supervisor = superviseEngines({ config, proxyUrl, log, onUp })
    await supervisor.ready
    await gateway.registry.waitFor(snapshot => inService(snapshot, [...urls.values()]), { signal: ending.signal })
  }

  function onUp (engine: string, url: string): void {
    log.info({ engine, url }, 'embedded engine is up')
    const old = urls.get(engine)
    urls.set(engine, url)
    // A restarted engine has another port, and no process will answer at the old one.
    if (old !== undefined && old !== url) gateway.registry.remove(old)
  }

  async function stop (): Promise<void> {
    ending.abort(new Error('the embedded engines are closed'))
    // First the engines: one that is still starting would delay `started`.
    await supervisor?.close()
    await started?.catch(() => {})
    await server.close()
  }

  return {
    ready,
    progress: () => ({ up: urls.size, of: config.encoders + config.engines + config.prefill + config.decode }),
    pids: () => supervisor?.pids() ?? [],
    problem: () => problem,
    start,
    close: async () => { await (closed ??= stop()) }
  }
}

/** Have all engines registered, been probed and been linked to each other? */
function inService (snapshot: RegistrySnapshot, urls: readonly string[]): boolean {
  const nodes = urls.map(url => snapshot.byId.get(url))
  return nodes.every(node => node?.state === 'healthy' && [...node.links.values()].every(link => link.state !== 'linking' && link.state !== 'none'))
}
