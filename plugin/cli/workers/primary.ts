/** The primary of several workers: it starts them, and has what they share: the nodes, the counts, the traces, the page. */
import cluster, { type Worker } from 'node:cluster'
import { once } from 'node:events'
import { mkdtempSync, rmSync } from 'node:fs'
import { createServer as createTcpServer, type AddressInfo } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { Rates } from '../../http/keys/rates.ts'
import { epdWith } from '../../index.ts'
import { resolveOptions, type EpdOptions } from '../../options/index.ts'
import { createServer, embeddedReady, processOf, warnOfOpen, withPage, type GatewayProcess, type GatewayProcessOptions } from '../gateway-process.ts'
import { reloading } from '../reload.ts'
import { keepNodes } from '../state-file.ts'
import type { Shares, ToPrimary, ToWorker } from './calls.ts'
import { Channel } from './channel.ts'
import { rescueConnections } from './hand-over.ts'
import { Member, type Counts } from './member.ts'
import { fromWorkers } from './operators.ts'
import { optionsOfPrimary, sharesOf } from './options.ts'
import { Owners, type PartCall } from './part-calls.ts'

const WORKER = fileURLToPath(new URL('./worker.js', import.meta.url))
/** A worker that dies sooner after its start than this is started again only after a pause, which doubles. Milliseconds. */
const [YOUNG_MS, PAUSE_MS, MAX_PAUSE_MS] = [5_000, 250, 10_000]
/** A worker that does not answer is left out of the numbers of that moment. Milliseconds. */
const ANSWER_MS = 2_000
/** Beyond the grace time, for a worker to end. Milliseconds. */
const END_MS = 15_000

interface Running {
  readonly worker: Worker
  readonly member: Member
  readonly channel: Channel<ToWorker, ToPrimary>
  readonly since: number
  readonly socket: string
  listens: boolean
}

export async function startWorkers (count: number, init: GatewayProcessOptions): Promise<GatewayProcess> {
  const resolved = resolveOptions(init.options)
  const ui = withPage(init.options)
  const folder = mkdtempSync(join(tmpdir(), 'fastify-epd-'))
  const socket = process.platform === 'win32' ? `\\\\.\\pipe\\${folder.replace(/.*[\\/]/, '')}-primary.sock` : join(folder, 'primary.sock')
  const app = createServer(resolved, init.logLevel)
  let crew: Crew | undefined
  try {
    fromWorkers(app)
    // What has happened until now is in the numbers.
    app.addHook('onRequest', async request => { if (request.routeOptions.url === `${resolved.prefix}/metrics`) await crew?.flush() })
    // The uses of nodes happen here once more, and the workers measure them.
    await app.register(epdWith({ stages: { record () {} }, inFlight: () => crew?.inFlight ?? 0 }), { ...optionsOfPrimary(init.options), ui })
    const { gateway } = app.epd
    const workers = crew = new Crew(count, init, { gateway, rates: new Rates(resolved.rates, app.log), byKey: new Map(), log: app.log }, socket, resolved.server.port === 0 ? await freePort(resolved.server.host) : resolved.server.port)
    if (gateway.thumbnails !== undefined) gateway.thumbnails.find = async (trace, index) => await workers.picture(trace, index)
    const { load } = init
    if (load !== undefined) {
      let loaded: EpdOptions
      await app.register(reloading, {
        prefix: resolved.prefix,
        gateway,
        load: async () => {
          loaded = await load()
          return { ui, ...optionsOfPrimary(loaded) }
        },
        applied: async () => { await workers.reload(loaded) }
      })
    }
    if (resolved.server.stateFile !== undefined) app.addHook('onClose', keepNodes(resolved.server.stateFile, gateway))
    await app.listen({ path: socket })
    const url = await workers.start()
    warnOfOpen(resolved, init.onProgress)
    await embeddedReady(app.epd.embedded, init.onProgress)
    return processOf(resolved, url, ui, close)
  } catch (err) {
    await close()
    throw err
  }

  async function close (): Promise<void> {
    await crew?.close(resolved.timeouts.grace + END_MS)
    await app.close()
    rmSync(folder, { recursive: true, force: true })
  }
}

class Crew {
  readonly #count: number
  readonly #init: GatewayProcessOptions
  readonly #counts: Counts
  readonly #socket: string
  readonly #running = new Map<number, Running>()
  readonly #shares: Shares
  /** A worker that is started later would take another one where a free one is asked for. */
  readonly #port: number
  readonly #owners = new Owners(async call => await this.#ownerOf(call))
  #options: EpdOptions
  #nodes = ''
  #closing = false
  #started = false
  #pause = PAUSE_MS

  constructor (count: number, init: GatewayProcessOptions, counts: Counts, socket: string, port: number) {
    this.#count = count
    this.#port = port
    this.#init = init
    this.#counts = counts
    this.#socket = socket
    this.#options = init.options
    this.#shares = sharesOf(init.options, count)
    cluster.setupPrimary({ exec: WORKER, args: [] })
    const { registry } = counts.gateway
    registry.on('change', () => { this.#tellNodes() })
  }

  get inFlight (): number {
    return this.#all().reduce((sum, { member }) => sum + member.inFlight, 0)
  }

  /** Resolves with the URL when all workers listen. */
  async start (): Promise<string> {
    const [first] = await Promise.all(Array.from({ length: this.#count }, async () => await this.#fork()))
    this.#started = true
    return first!
  }

  /** Resolves when all workers have told what has happened at them. */
  async flush (): Promise<void> {
    await Promise.all(this.#all().map(async ({ channel }) => { await inTime(channel.call('flush', null)) }))
  }

  async picture (trace: string, index: number): Promise<{ readonly type: string, readonly bytes: Buffer } | undefined> {
    const found = (await Promise.all(this.#all().map(async ({ channel }) => await inTime(channel.call('picture', { trace, index }))))).find(picture => picture !== undefined && picture !== null)
    return found === undefined || found === null ? undefined : { type: found.type, bytes: Buffer.from(found.base64, 'base64') }
  }

  /** Resolves when all workers have the options. */
  async reload (options: EpdOptions): Promise<void> {
    this.#options = options
    this.#tellNodes()
    await Promise.all(this.#all().map(async ({ channel }) => { await inTime(channel.call('reload', options)) }))
  }

  /** Lets the workers end what they have in flight. */
  async close (withinMs: number): Promise<void> {
    this.#closing = true
    const gone = this.#all().map(async ({ worker, channel }) => {
      if (worker.isDead()) return
      channel.tell('close', null)
      await once(worker, 'exit')
    })
    const late = setTimeout(() => { for (const { worker } of this.#all()) worker.process.kill('SIGKILL') }, withinMs)
    await Promise.all(gone)
    clearTimeout(late)
    this.#counts.rates.close()
  }

  #all (): Running[] {
    return [...this.#running.values()]
  }

  #tellNodes (): void {
    const listed = this.#counts.gateway.registry.listed()
    const text = JSON.stringify(listed)
    if (text === this.#nodes) return
    this.#nodes = text
    for (const { channel } of this.#all()) channel.tell('nodes', listed)
  }

  /** The worker that has the request, else the first one: all calls about it must meet. */
  async #ownerOf (call: PartCall): Promise<string> {
    const all = this.#all().filter(({ listens }) => listens)
    const has = await Promise.all(all.map(async ({ channel }) => await inTime(channel.call('has', call))))
    return all[Math.max(0, has.indexOf(true))]!.socket
  }

  /** Resolves with the URL when the worker listens; rejects when it ends before. */
  async #fork (): Promise<string> {
    const worker = cluster.fork()
    rescueConnections(worker)
    const { log } = this.#counts
    const member = new Member(this.#counts)
    let reason = 'it ended before it was ready'
    const url = await new Promise<string>((resolve, reject) => {
      const channel: Running['channel'] = new Channel<ToWorker, ToPrimary>(message => { if (worker.isConnected()) worker.send(message, undefined, () => {}) }, {
        ...member.calls,
        birth: () => ({ options: { ...this.#options, server: { ...this.#options.server, port: this.#port } }, shares: this.#shares, nodes: this.#counts.gateway.registry.listed(), logLevel: this.#init.logLevel, socket: this.#socket, own: running.socket }),
        ownerOf: async call => await this.#owners.of(call),
        listening: url => {
          running.listens = true
          resolve(url)
        },
        failed: why => { reason = why }
      })
      const running: Running = { worker, member, channel, since: performance.now(), socket: this.#socket.replace(/primary(?=\.sock$)/, String(worker.id)), listens: false }
      this.#running.set(worker.id, running)
      worker.on('message', message => { channel.receive(message) })
      worker.on('error', err => { log.warn({ err }, 'a worker was not reached') })
      worker.once('exit', (code, signal) => {
        channel.close(new Error('the worker is gone'))
        member.gone()
        this.#gone(worker.id, code, signal)
        reject(new Error(reason))
      })
    })
    return url
  }

  #gone (id: number, code: number | null, signal: string | null): void {
    const { since, worker, listens } = this.#running.get(id)!
    this.#running.delete(id)
    // The first ones must all come up: `start` rejects.
    if (this.#closing || !(this.#started || listens)) return
    const { log } = this.#counts
    log.error({ pid: worker.process.pid, code, signal }, 'a worker has ended; another one takes its place')
    this.#pause = performance.now() - since < YOUNG_MS ? Math.min(2 * this.#pause, MAX_PAUSE_MS) : PAUSE_MS
    const again = (): void => {
      if (!this.#closing) this.#fork().catch((err: unknown) => { if (!this.#closing) log.error({ reason: (err as Error).message }, 'a worker did not start') })
    }
    if (this.#pause === PAUSE_MS) again()
    else setTimeout(again, this.#pause)
  }
}

async function freePort (host: string): Promise<number> {
  const server = createTcpServer().listen(0, host)
  await once(server, 'listening')
  const { port } = server.address() as AddressInfo
  server.close()
  await once(server, 'close')
  return port
}

async function inTime<T> (answer: Promise<T>): Promise<T | undefined> {
  let timer: NodeJS.Timeout | undefined
  const late = new Promise<undefined>(resolve => { timer = setTimeout(() => { resolve(undefined) }, ANSWER_MS) })
  try {
    return await Promise.race([answer, late])
  } catch {
    // The worker has ended.
    return undefined
  } finally {
    clearTimeout(timer)
  }
}
