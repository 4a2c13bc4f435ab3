/** Real vLLM servers on cards, in the arrangements that `npm run bench:epd` compares. */
import { spawn, type ChildProcess } from 'node:child_process'
import { once } from 'node:events'
import { closeSync, openSync, readFileSync } from 'node:fs'
import { mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout as delay } from 'node:timers/promises'
import { freePort } from '../helper/free-port.ts'
import type { Backend } from './fronts.ts'

/** The gateway's role of a server, whether it loads an encoder's features, and which side of a KV transfer it is. */
const ROLES = {
  h: { role: 'hybrid' },
  h2: { role: 'hybrid' },
  e: { role: 'encoder', ec: 'ec_producer' },
  pd: { role: 'hybrid', ec: 'ec_consumer' },
  p: { role: 'prefill', ec: 'ec_consumer', kv: 'kv_producer' },
  d: { role: 'decode', kv: 'kv_consumer' }
} as const satisfies Record<string, { role: Backend['role'], ec?: string, kv?: string }>
type Role = keyof typeof ROLES

interface Place { readonly role: Role, readonly card: string }
export interface Arm { readonly name: string, readonly servers: readonly Place[] }
export interface Server extends Place { readonly url: string, readonly backend: Backend['role'], readonly log: string, readonly child: ChildProcess }

export interface Flags {
  readonly command: readonly string[]
  readonly all: readonly string[]
  readonly encoder: readonly string[]
  readonly language: readonly string[]
  /** Where NixlConnector keeps blocks: `cuda`, or `cpu` for servers without a card. */
  readonly kvBuffer: string
  readonly startMs: number
  /** For logs. */
  readonly out: string
}

/** @returns undefined where the text is no arrangement */
export function readArm (text: string): Arm | undefined {
  const [, name, list] = /^([\w-]+)=(\S+)$/.exec(text) ?? []
  const servers = list?.split(',').flatMap(one => {
    const [, role, card] = /^(\w+)@(\d+)$/.exec(one) ?? []
    return role !== undefined && Object.hasOwn(ROLES, role) ? [{ role: role as Role, card: card! }] : []
  })
  return servers === undefined || servers.length < list!.split(',').length ? undefined : { name: name!, servers }
}

/** One that two arrangements name at the same place has one name. */
function namesOf ({ servers }: Arm): string[] {
  const counts = new Map<string, number>()
  return servers.map(({ role, card }) => {
    const name = `${role}@${card}`
    counts.set(name, (counts.get(name) ?? 0) + 1)
    return `${name}-${counts.get(name)!}`
  })
}

/** The servers of one or more arrangements. */
export class Fleet {
  readonly #flags: Flags
  readonly #running = new Set<ChildProcess>()
  #folder = ''

  constructor (flags: Flags) {
    this.#flags = flags
  }

  /**
   * Starts them at once, or, where there is one arrangement, those of one card one after the other: each measures what is free there.
   *
   * @returns the servers of each arrangement, or why it has none
   */
  async start (arms: readonly Arm[]): Promise<Array<readonly Server[] | Error>> {
    // Memory where there is some: the features of a picture are megabytes.
    this.#folder = await mkdtemp(join(process.platform === 'linux' ? '/dev/shm' : tmpdir(), 'epd-bench-'))
    const logging = await loggingConfig(this.#flags.out)
    const started = new Map<string, { readonly card: string, readonly server: Promise<Server> }>()
    const lists: Array<Array<Promise<Server>>> = []
    for (const arm of arms) {
      const names = namesOf(arm)
      for (const [i, place] of arm.servers.entries()) {
        if (started.has(names[i]!)) continue
        if (arms.length === 1) await Promise.allSettled([...started.values()].filter(({ card }) => card === place.card).map(async ({ server }) => { await server }))
        const server = this.#start(place, join(this.#flags.out, `${arm.name}-${names[i]!.replace('@', '-')}.log`), logging)
        server.catch(() => {})
        started.set(names[i]!, { card: place.card, server })
      }
      lists.push(names.map(async name => await started.get(name)!.server))
    }
    return await Promise.all(lists.map(async servers => await Promise.all(servers).catch((error: Error) => error)))
  }

  async stop (): Promise<void> {
    const ended = Promise.all([...this.#running].map(async child => { if (child.exitCode === null && child.signalCode === null) await once(child, 'exit') }))
    this.signal('SIGTERM')
    await Promise.race([ended, delay(3_000, undefined, { ref: false })])
    // And what they have left behind.
    this.signal('SIGKILL')
    this.#running.clear()
    if (this.#folder !== '') await rm(this.#folder, { recursive: true, force: true })
  }

  /** To all of their processes: each server is a group of its own. */
  signal (signal: NodeJS.Signals): void {
    for (const child of this.#running) {
      try { process.kill(-child.pid!, signal) } catch {}
    }
  }

  async #start (place: Place, log: string, logging: string): Promise<Server> {
    const { command, startMs } = this.#flags
    const port = await freePort()
    const file = openSync(log, 'w')
    const child = spawn(command[0]!, [...command.slice(1), '--served-model-name', 'vlm', '--host', '127.0.0.1', '--port', String(port), ...this.#own(place.role)], {
      detached: true,
      stdio: ['ignore', file, file],
      env: {
        ...process.env,
        CUDA_VISIBLE_DEVICES: place.card,
        VLLM_NO_USAGE_STATS: '1',
        DO_NOT_TRACK: '1',
        // With an EC connector vLLM falls back to the first model runner: all get the same, but for h2.
        VLLM_USE_V2_MODEL_RUNNER: place.role === 'h2' ? '1' : '0',
        VLLM_NIXL_SIDE_CHANNEL_HOST: '127.0.0.1',
        VLLM_NIXL_SIDE_CHANNEL_PORT: String(await freePort()),
        VLLM_LOGGING_CONFIG_PATH: logging
      }
    })
    closeSync(file)
    let problem: string | undefined
    child.once('error', error => { problem = `${command[0]}: ${error.message}` })
    child.once('exit', () => { problem ??= `a server ended while it started; see ${log}` })
    this.#running.add(child)
    const url = `http://127.0.0.1:${port}`
    const end = performance.now() + startMs
    while (!(await fetch(`${url}/health`, { signal: AbortSignal.timeout(5_000) }).then(answer => answer.ok, () => false))) {
      if (problem !== undefined) throw new Error(problem)
      if (performance.now() > end) throw new Error(`${url} does not answer /health; see ${log}`)
      await delay(500)
    }
    return { ...place, url, backend: ROLES[place.role].role, log, child }
  }

  /** A user's flags come last, so that they count. */
  #own (name: Role): string[] {
    const { all, encoder, language, kvBuffer } = this.#flags
    const { role, ec, kv }: { role: string, ec?: string, kv?: string } = ROLES[name]
    return [
      ...role === 'encoder' ? ['--enforce-eager', '--no-enable-prefix-caching', '--max-num-batched-tokens', '65536'] : [],
      ...ec === undefined ? [] : ['--ec-transfer-config', JSON.stringify({ ec_connector: 'ECExampleConnector', ec_role: ec, ec_connector_extra_config: { shared_storage_path: this.#folder } })],
      ...kv === undefined ? [] : ['--kv-transfer-config', JSON.stringify({ kv_connector: 'NixlConnector', kv_role: kv, kv_buffer_device: kvBuffer })],
      ...all,
      ...role === 'encoder' ? encoder : language
    ]
  }
}

/** What vLLM logs by itself, and the encoder cache connectors' own lines. */
async function loggingConfig (out: string): Promise<string> {
  const file = join(out, 'logging.json')
  await writeFile(file, JSON.stringify({
    version: 1,
    disable_existing_loggers: false,
    handlers: { console: { class: 'logging.StreamHandler', stream: 'ext://sys.stdout' } },
    loggers: {
      vllm: { handlers: ['console'], level: 'INFO', propagate: false },
      'vllm.distributed.ec_transfer': { handlers: ['console'], level: 'DEBUG', propagate: false }
    }
  }))
  return file
}

/** The line with which ECExampleConnector says that a server has loaded an encoder's features, at level DEBUG. */
const LOADED = /Success load encoder cache/g

/** How many features these servers have loaded until now. */
export function loads (servers: readonly Server[]): number {
  return servers.reduce((sum, { log }) => sum + (readFileSync(log, 'utf8').match(LOADED)?.length ?? 0), 0)
}
