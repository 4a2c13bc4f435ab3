/** Real SGLang servers as child processes, started by a command line that the caller gives. */
import { spawn, type ChildProcess } from 'node:child_process'
import { once } from 'node:events'
import { openSync } from 'node:fs'
import { mkdtemp } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { freePort } from '../helper/free-port.ts'
import { until } from '../helper/until.ts'

/** Loading a model takes minutes on a busy machine, in milliseconds. */
const START_MS = 900_000

let logs: Promise<string> | undefined

export class SglangServer {
  readonly url: string
  readonly #child: ChildProcess
  readonly #log: string
  exited = false

  private constructor (url: string, child: ChildProcess, log: string) {
    this.url = url
    this.#child = child
    this.#log = log
    child.once('exit', () => { this.exited = true })
  }

  /** @param command what starts a server, up to its role: `python -m sglang.launch_server --model-path ...` */
  static async start (command: string, name: string, args: readonly string[]): Promise<SglangServer> {
    const port = await freePort()
    const folder = await (logs ??= mkdtemp(join(tmpdir(), 'epd-sglang-')))
    const log = join(folder, `${name}.log`)
    const out = openSync(log, 'w')
    // A group of its own, so that its schedulers end with it.
    const child = spawn('sh', ['-c', `exec ${command} --host 127.0.0.1 --port ${port} ${args.join(' ')}`], { stdio: ['ignore', out, out], detached: true, env: { SGLANG_HOST_IP: '127.0.0.1', ...process.env } })
    const server = new SglangServer(`http://127.0.0.1:${port}`, child, log)
    process.once('exit', () => { server.signal('SIGKILL') })
    for (const signal of ['SIGINT', 'SIGTERM'] as const) process.once(signal, () => { process.exit(1) })
    return server
  }

  /** Resolves when it answers /health. */
  async ready (): Promise<this> {
    await until(async () => {
      if (this.exited) throw new Error(`the server has ended: see ${this.#log}`)
      return await fetch(`${this.url}/health`, { signal: AbortSignal.timeout(60_000) }).then(answer => answer.status === 200, () => false)
    }, `${this.url} answers (log: ${this.#log})`, START_MS)
    return this
  }

  signal (signal: NodeJS.Signals): void {
    try { process.kill(-this.#child.pid!, signal) } catch { /* It has ended. */ }
  }

  async kill (): Promise<void> {
    if (this.exited) return
    const exit = once(this.#child, 'exit')
    this.signal('SIGKILL')
    await exit
  }
}
