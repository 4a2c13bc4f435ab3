import { readdirSync } from 'node:fs'
import { mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { Test } from 'tap'
import { Agent, fetch, type Response } from 'undici'
import { fingerprint } from '../../plugin/body/index.ts'
import type { EpdOptions } from '../../plugin/index.ts'
import { rank } from '../../plugin/planning/index.ts'
import { startCli, type CliServer, type Ending } from '../helper/cli.ts'
import { buildGateway } from '../helper/fake-gateway.ts'
import { freePort } from '../helper/free-port.ts'
import { metric } from '../helper/metrics.ts'
import { unrestOf } from '../helper/unrest.ts'
import { until as poll } from '../helper/until.ts'
import { FaultyNode } from './faulty-node.ts'

export const MODEL = 'tiny-internvl'
const WIRE_ROLES = { hybrid: 1, prefill: 2, decode: 3, encoder: 4 } as const
type Role = keyof typeof WIRE_ROLES
/** Who pulls blocks from whom. */
const CONSUMERS: Readonly<Record<Role, readonly Role[]>> = { encoder: ['hybrid', 'prefill'], prefill: ['decode'], hybrid: [], decode: [] }

export interface Answer {
  readonly status: number
  readonly headers: Response['headers']
  readonly body: any
}

/** Its connections must not be taken for files that a server leaves open. */
const dispatcher = new Agent({ keepAliveTimeout: 500, keepAliveMaxTimeout: 500 })

async function get (url: string): Promise<Response> {
  return await fetch(url, { dispatcher })
}

async function post (url: string, body: object, signal?: AbortSignal): Promise<Response> {
  return await fetch(url, { dispatcher, method: 'POST', headers: { 'content-type': 'application/json' }, body: JSON.stringify(body), ...(signal === undefined ? {} : { signal }) })
}

/** Long enough for a machine that is busy with other things; a quiet one never waits that long. */
const PATIENCE_MS = 60_000

export async function until<T> (check: () => T | Promise<T>, what: string, every?: number): Promise<NonNullable<T>> {
  return await poll(check, what, PATIENCE_MS, every)
}

/** Milliseconds between two looks at all processes: each look costs each of them a few. */
const LOOK_MS = 100

/** A promise to be resolved by hand. */
export function gate (): { readonly opened: Promise<void>, open (): void } {
  let open = (): void => {}
  const opened = new Promise<void>(resolve => { open = resolve })
  return { opened, open }
}

/** The encoder that a picture belongs to, of these. */
export function ownerOf (url: string, encoders: readonly Engine[]): Engine {
  return rank(fingerprint(Buffer.from(url)), encoders)[0]!
}

/** Open file descriptors of a process; undefined where the system does not report them. */
export function openFiles (pid: number): number | undefined {
  try { return readdirSync(`/proc/${pid}/fd`).length } catch { return undefined }
}

/** A real engine process, behind a {@link FaultyNode} by default. */
export class Engine {
  readonly role: Role
  readonly id: string
  readonly node: FaultyNode
  readonly #t: Ending
  readonly #flags: readonly string[]
  #server: CliServer

  private constructor (t: Ending, role: Role, flags: readonly string[], node: FaultyNode, server: CliServer) {
    this.role = role
    this.id = node.url
    this.node = node
    this.#t = t
    this.#flags = flags
    this.#server = server
  }

  static async start (t: Ending, role: Role, options: { flags?: readonly string[], flakyWire?: boolean } = {}): Promise<Engine> {
    // With a public URL the engine prints that URL and not its port, and it must restart on the same port.
    const port = await freePort()
    const node = await FaultyNode.listen(port, options)
    t.teardown(() => node.close())
    const flags = ['engine', '--role', role, '--port', String(port), '--public-url', node.url, '--threads', '1', '--log-level', 'error', ...options.flags ?? []]
    return new Engine(t, role, flags, node, await startCli(t, flags))
  }

  get pid (): number { return this.#server.child.pid! }

  get #own (): string { return `http://127.0.0.1:${this.node.port}` }

  get dead (): boolean { return this.#server.child.exitCode !== null || this.#server.child.signalCode !== null }

  /** Stops the process where it is (SIGSTOP), or lets it go on. */
  freeze (frozen: boolean): void {
    this.#server.child.kill(frozen ? 'SIGSTOP' : 'SIGCONT')
  }

  async stop (signal: NodeJS.Signals): Promise<number | null> {
    return await this.#server.stop(signal)
  }

  /** Another process under the same id. */
  async startAgain (): Promise<void> {
    this.#server = await startCli(this.#t, this.#flags)
  }

  async killAndStartAgain (): Promise<void> {
    await this.stop('SIGKILL')
    await this.startAgain()
  }

  async metrics (): Promise<string> {
    return await (await get(`${this.#own}/metrics`)).text()
  }

  async gauge (name: string): Promise<number> {
    return metric(await this.metrics(), name) ?? NaN
  }

  /** Number of the process: one more after each restart. */
  async epoch (): Promise<number> {
    return (await (await get(`${this.#own}/distserve/engine_info`)).json() as { epoch: number }).epoch
  }

  async clearCache (): Promise<void> {
    await post(`${this.#own}/distserve/clear_cache`, {})
  }

  /** Why the engine is not idle; undefined when it is. */
  async unrest (): Promise<string | undefined> {
    return unrestOf(await this.metrics())
  }

  /** After clearing the cache: does it hold anything still? */
  async remains (): Promise<string | undefined> {
    await this.clearCache()
    const text = await this.metrics()
    for (const pool of ['feature', 'kv']) {
      const [total, free] = ['capacity', 'free'].map(what => metric(text, `epd_${pool}_blocks_${what}`) ?? 0)
      if (free !== total) return `${pool} blocks: ${free} free of ${total} after clearing`
    }
  }
}

export interface NodeStatus {
  readonly role: number
  readonly health: string
  readonly epoch: number | null
  readonly unfinished: number
  readonly vision_tokens: number
  readonly breakers: { readonly encode: string, readonly prefill: string, readonly decode: string }
  readonly links: Record<string, { readonly state: string, readonly reason?: string }>
}

export interface Question {
  readonly pictures?: readonly string[]
  readonly more?: object
  readonly signal?: AbortSignal
}

function bodyOf ({ pictures = [], more = {} }: Question): object {
  const parts = pictures.map(url => ({ type: 'image_url', image_url: { url } }))
  return { model: MODEL, temperature: 0, max_tokens: 8, messages: [{ role: 'user', content: [...parts, { type: 'text', text: 'How many shapes are there?' }] }], ...more }
}

/** A stream as its client sees it: whole events, as they come. */
export class Stream {
  readonly status: number
  readonly headers: Response['headers']
  /** The JSON of each event; the text of one that is none, such as `[DONE]`. */
  readonly events: any[] = []
  /** The JSON of an answer that is no stream, once it has ended. */
  body: any
  /** Resolves when the answer has ended: true, or false when it broke off. */
  readonly ended: Promise<boolean>

  constructor (response: Response) {
    this.status = response.status
    this.headers = response.headers
    this.ended = this.#read(response).then(() => true, () => false)
  }

  get last (): any { return this.events.at(-1) }

  async #read (response: Response): Promise<void> {
    let rest = ''
    const decoder = new TextDecoder()
    for await (const chunk of response.body as AsyncIterable<Uint8Array>) {
      const parts = (rest + decoder.decode(chunk, { stream: true })).split('\n\n')
      rest = parts.pop()!
      for (const part of parts) if (part.startsWith('data: ')) this.events.push(part === 'data: [DONE]' ? '[DONE]' : JSON.parse(part.slice(6)))
    }
    if (rest.startsWith('{')) this.body = JSON.parse(rest)
  }
}

/** A stage of a request, in its trace. */
export interface Stage {
  readonly name: string
  readonly offsetMs: number
  readonly durationMs: number
  readonly attributes: Readonly<Record<string, unknown>>
  readonly status: { readonly message?: string }
}

/** A gateway over real engines. */
export class Gateway {
  readonly url: string

  protected constructor (url: string) {
    this.url = url
  }

  /** In this process, for what needs none of its own. */
  static async here (t: Ending, options: EpdOptions = {}): Promise<Gateway> {
    return new Gateway((await buildGateway(t, { options: { adapters: [], bypass: 'never', ...options } })).url)
  }

  async metrics (): Promise<string> {
    return await (await get(`${this.url}/metrics`)).text()
  }

  async status (): Promise<Record<string, NodeStatus>> {
    return await (await get(`${this.url}/nodes/status`)).json() as Record<string, NodeStatus>
  }

  /** These nodes and no others, all healthy and every pair linked. */
  async use (...engines: readonly Engine[]): Promise<void> {
    const wanted = new Set(engines.map(engine => engine.id))
    for (const id of Object.keys(await this.status())) if (!wanted.has(id)) await post(`${this.url}/nodes/remove`, { url: id })
    // Of idle ones the first is asked: a hair faster than the next.
    for (const [i, engine] of engines.entries()) await this.add(engine, 1 - i / 1_000)
    await this.linked(...engines)
  }

  async add ({ id, role }: Engine, speed = 1): Promise<void> {
    await post(`${this.url}/nodes/add`, { url: id, status: { role: WIRE_ROLES[role], models: [MODEL], speed } })
  }

  /** Like `use`, with nodes that are new to the gateway: no failure is counted against them. */
  async useAfresh (...engines: readonly Engine[]): Promise<void> {
    await this.use()
    await this.use(...engines)
  }

  async linked (...engines: readonly Engine[]): Promise<void> {
    const pairs = engines.flatMap(from => engines.filter(to => CONSUMERS[from.role].includes(to.role)).map(to => [from.id, to.id] as const))
    // One that has just been started again is healthy and linked, too, until the gateway notices.
    const epochs = await Promise.all(engines.map(async engine => await engine.epoch()))
    await until(async () => {
      const nodes = await this.status()
      return engines.every(({ id }, i) => nodes[id]?.health === 'healthy' && nodes[id].epoch === epochs[i]) && pairs.every(([from, to]) => nodes[from]?.links[to]?.state === 'linked')
    }, 'all nodes are healthy and linked', LOOK_MS)
  }

  async ask (question: Question = {}): Promise<Answer> {
    const response = await post(`${this.url}/v1/chat/completions`, bodyOf(question), question.signal)
    const text = await response.text()
    return { status: response.status, headers: response.headers, body: text.startsWith('{') ? JSON.parse(text) : text }
  }

  async stream (question: Question = {}): Promise<Stream> {
    return new Stream(await post(`${this.url}/v1/chat/completions`, bodyOf({ ...question, more: { ...question.more, stream: true } }), question.signal))
  }

  /** Traces of requests that have not ended. */
  async runningTraces (): Promise<number> {
    const { traces } = await (await get(`${this.url}/epd/traces?limit=1000`)).json() as { traces: Array<{ partial: boolean }> }
    return traces.filter(({ partial }) => partial).length
  }

  /** The stages of one request at the gateway, in order of their start. */
  async stages (traceId: string): Promise<readonly Stage[]> {
    const { spans = [] } = await (await get(`${this.url}/epd/traces/${traceId}`)).json() as { spans?: Stage[] }
    return spans.filter(({ name }) => name.startsWith('epd.'))
  }

  async unrest (): Promise<string | undefined> {
    const busy = Object.entries(await this.status()).find(([, node]) => node.unfinished !== 0 || node.vision_tokens !== 0)
    return busy === undefined ? undefined : `${busy[0]} has ${busy[1].unfinished} unfinished, ${busy[1].vision_tokens} vision tokens`
  }
}

/** A gateway in a process of its own. */
export class GatewayProcess extends Gateway {
  readonly server: CliServer

  private constructor (server: CliServer) {
    super(server.url)
    this.server = server
  }

  static async start (t: Ending, { routing, admission, ...config }: { routing?: object, admission?: object } & Record<string, unknown> = {}): Promise<GatewayProcess> {
    const folder = await mkdtemp(join(tmpdir(), 'epd-chaos-'))
    t.teardown(() => rm(folder, { recursive: true }))
    const file = join(folder, 'epd.config.json')
    await writeFile(file, JSON.stringify({ embedded: false, bypass: 'never', routing: { policy: 'least-tokens', ...routing }, admission: { encoderTime: 600_000, ...admission }, ...config }))
    return new GatewayProcess(await startCli(t, ['serve', '--config', file, '--port', '0', '--log-level', 'error']))
  }

  get pid (): number { return this.server.child.pid! }
}

/** Waits until gateways and engines hold nothing of any request; gives what they still hold after a long while. */
export async function settle (...parts: ReadonlyArray<Gateway | Engine>): Promise<string[]> {
  let unrest: string[] = []
  await until(async () => {
    const reasons = await Promise.all(parts.filter(part => !('dead' in part && part.dead)).map(async part => await part.unrest()))
    unrest = reasons.filter(reason => reason !== undefined)
    return unrest.length === 0
  }, 'nothing is in flight', LOOK_MS).catch(() => {})
  return unrest
}

/** Asserts that nothing of any request is held. Returns the milliseconds until that was so. */
export async function quiet (t: Test, ...parts: ReadonlyArray<Gateway | Engine>): Promise<number> {
  const start = performance.now()
  const unrest = await settle(...parts)
  t.same(unrest, [], 'nothing is held')
  return performance.now() - start
}

/** An error answer in OpenAI's shape, with these. */
export function isError (t: Test, { status, headers, body }: Answer, expected: { status: number, code: unknown, param?: unknown, again?: boolean }): void {
  t.equal(status, expected.status, JSON.stringify(body))
  t.match(headers.get('content-type'), /^application\/json/)
  t.match(body, { error: { message: String, type: String, code: expected.code, param: expected.param ?? null } })
  t.equal(headers.has('retry-after'), expected.again === true, 'Retry-After when the client may come again')
}
