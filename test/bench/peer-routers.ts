/** Routers that are compared with this one, each started so that it has N cores and routes to the same servers. */
import { spawn, type ChildProcess } from 'node:child_process'
import { once } from 'node:events'
import { accessSync, constants, existsSync, mkdirSync, readdirSync, readFileSync, writeFileSync } from 'node:fs'
import { delimiter, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { freePort } from '../helper/free-port.ts'
import { until } from '../helper/until.ts'
import { pinned } from './processes.ts'

const MAIN = fileURLToPath(new URL('../../plugin/cli/main.js', import.meta.url))
const TICKS_PER_SECOND = 100

interface Place { readonly backends: readonly string[], readonly port: number, readonly metrics: number, readonly cores: number, readonly folder: string }

interface Kind {
  readonly label: string
  /** Undefined where it is not installed. */
  readonly program: string | undefined
  /** Its name in messages, and how to say where it is. */
  readonly missing: string
  /** One process has one core, however many there are. */
  readonly single?: true
  /** Its code is compiled while it runs. */
  readonly compiles?: true
  args (place: Place): readonly string[]
  /** Where it learns of its servers after it has started. */
  begun? (url: string, backends: readonly string[]): Promise<void>
}

/** A program's path: what the variable says, else the first on PATH or in the places. */
function find (variable: string, name: string, places: readonly string[] = []): string | undefined {
  const said = process.env[variable]
  if (said !== undefined) return said
  return [...(process.env.PATH ?? '').split(delimiter).map(folder => join(folder, name)), ...places].find(file => {
    try {
      accessSync(file, constants.X_OK)
      return true
    } catch {
      return false
    }
  })
}

const ours = (label: string, traces: boolean): Kind => ({
  label,
  program: process.execPath,
  missing: '',
  compiles: true,
  args: ({ backends, port, cores, folder }) => {
    const config = join(folder, 'config.json')
    writeFileSync(config, JSON.stringify({
      nodes: backends.map(url => ({ url, role: 'hybrid', adapter: 'openai' })),
      routing: { policy: 'least-tokens' },
      ...traces ? {} : { telemetry: { traces: false } }
    }))
    return [MAIN, 'serve', '--config', config, '--port', String(port), '--workers', String(cores), '--log-level', 'error']
  }
})

export const KINDS: readonly Kind[] = [
  ours('fastify-epd serve', true),
  ours('fastify-epd serve, no traces', false),
  {
    label: 'nginx',
    program: find('EPD_NGINX', 'nginx', ['/usr/sbin/nginx', '/usr/local/sbin/nginx', '/opt/homebrew/bin/nginx']),
    missing: 'nginx (EPD_NGINX or PATH)',
    args: ({ backends, port, cores, folder }) => {
      const config = join(folder, 'nginx.conf')
      writeFileSync(config, nginxConfig(backends, port, cores, folder))
      return ['-p', folder, '-c', config, '-e', join(folder, 'error.log')]
    }
  },
  {
    label: 'smg',
    program: find('EPD_SMG', 'smg'),
    missing: 'smg (EPD_SMG or PATH; on PyPI)',
    args: ({ backends, port, metrics }) => ['launch', '--worker-urls', ...backends, '--policy', 'round_robin', '--host', '127.0.0.1', '--port', String(port), '--prometheus-host', '127.0.0.1', '--prometheus-port', String(metrics), '--log-level', 'error']
  },
  {
    label: 'vllm-router',
    program: find('EPD_VLLM_ROUTER', 'vllm-router'),
    missing: 'vllm-router (EPD_VLLM_ROUTER or PATH; on PyPI)',
    args: ({ backends, port, metrics }) => ['--worker-urls', ...backends, '--policy', 'round_robin', '--host', '127.0.0.1', '--port', String(port), '--prometheus-host', '127.0.0.1', '--prometheus-port', String(metrics), '--log-level', 'error']
  },
  {
    label: "LMDeploy's proxy",
    program: find('EPD_LMDEPLOY', 'lmdeploy'),
    missing: 'lmdeploy (EPD_LMDEPLOY or PATH; on PyPI)',
    single: true,
    args: ({ port }) => ['serve', 'proxy', '--server-name', '127.0.0.1', '--server-port', String(port), '--routing-strategy', 'min_observed_latency', '--log-level', 'ERROR'],
    begun: async (url, backends) => {
      for (const backend of backends) await fetch(`${url}/nodes/add`, { method: 'POST', headers: { 'content-type': 'application/json' }, body: JSON.stringify({ url: backend }) })
    }
  }
]

/** A relay that looks at nothing and keeps nothing. */
function nginxConfig (backends: readonly string[], port: number, cores: number, folder: string): string {
  const kept = 'keepalive_requests 1000000000;'
  return `worker_processes ${cores}; daemon off; pid ${folder}/nginx.pid; worker_rlimit_nofile 60000;
events { worker_connections 16384; }
http {
  access_log off;
  ${['client_body', 'proxy', 'fastcgi', 'uwsgi', 'scgi'].map(name => `${name}_temp_path ${folder}/${name};`).join(' ')}
  upstream backends { ${backends.map(url => `server ${new URL(url).host} max_fails=0;`).join(' ')} keepalive 1024; ${kept} }
  server {
    listen 127.0.0.1:${port} reuseport; client_max_body_size 64m; ${kept}
    location / { proxy_pass http://backends; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_request_buffering off; proxy_buffering off; }
  }
}
`
}

export class Router {
  static readonly #running = new Set<Router>()
  static { process.once('exit', () => { for (const router of Router.#running) router.#signal('SIGKILL') }) }

  readonly port: number
  readonly #child: ChildProcess

  private constructor (child: ChildProcess, port: number) {
    this.#child = child
    this.port = port
  }

  /** Resolves when it answers. */
  static async start (kind: Kind, backends: readonly string[], cores: number, folder: string): Promise<Router> {
    mkdirSync(folder, { recursive: true })
    const port = await freePort()
    const [command, ...args] = pinned(cores === 1 ? '0' : `0-${cores - 1}`, [kind.program!, ...kind.args({ backends, port, metrics: await freePort(), cores, folder })])
    // A group of its own, so that all its processes are counted and ended. The variable: threads of tokio, where pinning does not count.
    const child = spawn(command!, args, { detached: true, stdio: ['ignore', 'ignore', 'inherit'], env: { ...process.env, TOKIO_WORKER_THREADS: String(cores) } })
    const router = new Router(child, port)
    Router.#running.add(router)
    const url = `http://127.0.0.1:${port}`
    const ready = async (): Promise<boolean> => {
      if (child.exitCode !== null) throw new Error(`${kind.label} ended with ${child.exitCode}`)
      const answer = await fetch(`${url}/v1/chat/completions`, { method: 'POST', headers: { 'content-type': 'application/json' }, body: '{"model":"m","messages":[{"role":"user","content":"hi"}]}' }).catch(() => undefined)
      await answer?.arrayBuffer()
      return answer?.status === 200
    }
    await until(async () => await fetch(url).then(() => true, () => false), `${kind.label} listens`, 60_000, 100)
    await kind.begun?.(url, backends)
    await until(ready, `${kind.label} answers`, 60_000, 100)
    return router
  }

  /** CPU time of all its processes until now, in microseconds; NaN where no /proc says it. */
  cpu (): number {
    if (!existsSync('/proc/self/stat')) return Number.NaN
    let ticks = 0
    for (const pid of readdirSync('/proc')) {
      if (!/^\d+$/.test(pid)) continue
      const fields = statOf(pid)
      if (fields !== undefined && Number(fields[2]) === this.#child.pid) ticks += Number(fields[11]) + Number(fields[12])
    }
    return ticks * 1e6 / TICKS_PER_SECOND
  }

  async close (): Promise<void> {
    Router.#running.delete(this)
    if (this.#child.exitCode !== null || this.#child.signalCode !== null) return
    const ended = once(this.#child, 'exit')
    this.#signal('SIGKILL')
    await ended
  }

  #signal (signal: NodeJS.Signals): void {
    try {
      process.kill(-this.#child.pid!, signal)
    } catch {
      // It has ended.
    }
  }
}

/** The fields of /proc/PID/stat after the name. */
function statOf (pid: string): string[] | undefined {
  try {
    const text = readFileSync(`/proc/${pid}/stat`, 'latin1')
    return text.slice(text.lastIndexOf(')') + 2).split(' ')
  } catch {
    return undefined
  }
}
