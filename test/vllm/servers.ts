/** Real `vllm serve` processes, as docs/vllm.md writes their command lines. */
import { spawn, type ChildProcess } from 'node:child_process'
import { closeSync, openSync } from 'node:fs'
import { mkdir, mkdtemp, readdir, rm, truncate } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout as delay } from 'node:timers/promises'
import { freePort } from '../helper/free-port.ts'
import { until } from '../helper/until.ts'
import type { House, Peer } from './scenarios.ts'

export interface VllmCommand {
  /** `vllm`, found in PATH, or the path of one. */
  readonly command: string
  readonly model: string
  /** For every server: what the machine needs. */
  readonly extra: readonly string[]
  readonly patience: number
  /** Where servers send their spans. */
  readonly otlp?: string
}

/** `em` and `pdm`: E and PD with ECMooncakeConnector. */
type Name = 'plain' | 'e' | 'pd' | 'p' | 'd' | 'em' | 'pdm'

const ROLES = { plain: 'hybrid', e: 'encoder', pd: 'hybrid', p: 'prefill', d: 'decode', em: 'encoder', pdm: 'hybrid' } as const

/** Loopback only, nothing downloaded, nothing reported; several servers on one CPU. */
const ENVIRONMENT = {
  HF_HUB_OFFLINE: '1',
  TRANSFORMERS_OFFLINE: '1',
  VLLM_NO_USAGE_STATS: '1',
  DO_NOT_TRACK: '1',
  OMP_NUM_THREADS: '1',
  VLLM_CPU_OMP_THREADS_BIND: 'nobind',
  VLLM_NIXL_SIDE_CHANNEL_HOST: '127.0.0.1',
  UCX_TLS: 'tcp,self,shm',
  UCX_NET_DEVICES: 'lo'
}

/** Below a folder of its own, so that a file that leaves it is found. */
const DEPTH = ['a', 'b', 'ec']
const TRUNCATED_BYTES = 1000

export class VllmServers {
  readonly #command: VllmCommand
  readonly #root: string
  readonly #running = new Map<Name, ChildProcess>()
  readonly #ports = new Map<Name, number>()
  /** Of Mooncake's control sockets. */
  readonly #controls = new Map<Name, number>()

  private constructor (command: VllmCommand, root: string) {
    this.#command = command
    this.#root = root
    process.once('exit', () => { for (const child of this.#running.values()) end(child) })
  }

  static async prepare (command: VllmCommand): Promise<VllmServers> {
    const root = await mkdtemp(join(tmpdir(), 'fastify-epd-vllm-'))
    const servers = new VllmServers(command, root)
    await mkdir(servers.#folder, { recursive: true })
    return servers
  }

  get logs (): string { return this.#root }
  get #folder (): string { return join(this.#root, ...DEPTH) }

  async start (...names: readonly Name[]): Promise<void> {
    for (const name of names) {
      if (this.#ports.has(name)) continue
      this.#ports.set(name, await freePort())
      this.#controls.set(name, await freePort())
    }
    for (const name of names) this.#launch(name)
    await Promise.all(names.map(name => this.#ready(name)))
  }

  async stop (...names: readonly Name[]): Promise<void> {
    for (const name of names) {
      const child = this.#running.get(name)
      this.#running.delete(name)
      if (child === undefined) continue
      end(child)
      await until(async () => !(await answers(this.url(name))), `${name} has ended`)
    }
  }

  async close (): Promise<void> {
    await this.stop(...this.#running.keys())
    await rm(this.#folder, { recursive: true, force: true })
  }

  url (name: Name): string { return `http://127.0.0.1:${this.#ports.get(name)}` }

  house (...names: readonly Name[]): House {
    return {
      plain: this.url('plain'),
      patience: this.#command.patience,
      log: join(this.#root, 'gateway.log'),
      peers: names.map((name): Peer => ({
        url: this.url(name),
        role: ROLES[name],
        ...(name === 'pdm' ? { ecZmqAddrs: [`tcp://127.0.0.1:${this.#controls.get(name)}`] } : {}),
        alive: async () => await answers(this.url(name)),
        kill: async () => { await this.stop(name) },
        start: async () => { await this.start(name) }
      })),
      folder: {
        clear: async () => { for (const file of await this.#files()) await rm(file) },
        truncate: async () => { for (const file of await this.#files()) await truncate(file, TRUNCATED_BYTES) },
        outside: async () => (await readdir(this.#root, { recursive: true })).filter(path => path.endsWith('.safetensors') && !path.startsWith(join(...DEPTH, '/')))
      }
    }
  }

  async #files (): Promise<string[]> {
    return (await readdir(this.#folder, { recursive: true })).filter(path => path.endsWith('.safetensors')).map(path => join(this.#folder, path))
  }

  #launch (name: Name): void {
    const port = this.#ports.get(name)!
    // The file itself, not a pipe through this process: a server must not wait for it.
    const log = openSync(join(this.#root, `${name}.log`), 'a')
    const child = spawn(this.#command.command, this.#arguments(name, port), {
      // A group of its own: a server is several processes.
      detached: true,
      stdio: ['ignore', log, log],
      env: { ...process.env, ...ENVIRONMENT, ...(name === 'em' || name === 'pdm' ? { VLLM_HOST_IP: '127.0.0.1' } : {}), ...this.#spans(name), VLLM_NIXL_SIDE_CHANNEL_PORT: String(port + 10_000 > 65_535 ? port - 10_000 : port + 10_000) }
    })
    closeSync(log)
    child.on('error', error => { process.stderr.write(`${this.#command.command}: ${error.message}\n`) })
    this.#running.set(name, child)
  }

  #spans (name: Name): Record<string, string> {
    if (this.#command.otlp === undefined) return {}
    return { OTEL_EXPORTER_OTLP_TRACES_PROTOCOL: 'http/protobuf', OTEL_BSP_SCHEDULE_DELAY: '200', OTEL_SERVICE_NAME: 'vllm', OTEL_RESOURCE_ATTRIBUTES: `service.instance.id=${this.url(name)}` }
  }

  #arguments (name: Name, port: number): string[] {
    const ec = (role: string): string[] => ['--ec-transfer-config', JSON.stringify({ ec_connector: 'ECExampleConnector', ec_role: role, ec_connector_extra_config: { shared_storage_path: this.#folder } })]
    const kv = (role: string): string[] => ['--kv-transfer-config', JSON.stringify({ kv_connector: 'NixlConnector', kv_role: role, kv_buffer_device: 'cpu' })]
    const mooncake = (role: string): string[] => ['--ec-transfer-config', JSON.stringify({
      ec_connector: 'ECMooncakeConnector',
      ec_role: role,
      ec_ip: '127.0.0.1',
      ec_port: this.#controls.get(name),
      ec_buffer_device: 'cpu',
      ec_buffer_size: 100_000_000,
      ec_connector_extra_config: { mooncake_protocol: 'tcp' }
    })]
    const encoder = ['--no-enable-prefix-caching', '--max-num-batched-tokens', '65536']
    const own: Record<Name, string[]> = {
      plain: [],
      e: [...encoder, ...ec('ec_producer')],
      pd: ['--enable-mm-embeds', ...ec('ec_consumer')],
      p: ['--enable-mm-embeds', ...ec('ec_consumer'), ...kv('kv_producer')],
      d: ['--enable-mm-embeds', ...kv('kv_consumer')],
      em: [...encoder, ...mooncake('ec_producer')],
      pdm: ['--enable-mm-embeds', ...mooncake('ec_consumer')]
    }
    return [
      'serve', this.#command.model, '--served-model-name', 'tiny', '--host', '127.0.0.1', '--port', String(port),
      '--dtype', 'float32', '--enforce-eager', '--max-model-len', '8192', '--max-num-seqs', '8', ...own[name], ...this.#command.extra,
      ...(this.#command.otlp === undefined ? [] : ['--otlp-traces-endpoint', `${this.#command.otlp}/v1/traces`])
    ]
  }

  async #ready (name: Name): Promise<void> {
    const child = this.#running.get(name)!
    const end = performance.now() + this.#command.patience
    while (!(await answers(this.url(name)))) {
      if (child.exitCode !== null || child.signalCode !== null) throw new Error(`${name} ended while it started; see ${join(this.#root, `${name}.log`)}`)
      if (performance.now() > end) throw new Error(`${name} does not answer /health; see ${join(this.#root, `${name}.log`)}`)
      await delay(500)
    }
  }
}

async function answers (url: string): Promise<boolean> {
  return await fetch(`${url}/health`, { signal: AbortSignal.timeout(5000) }).then(answer => answer.ok, () => false)
}

function end (child: ChildProcess): void {
  try { process.kill(-child.pid!, 'SIGKILL') } catch {}
}
