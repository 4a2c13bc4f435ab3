import { fork, spawn, type ChildProcess, type ChildProcessByStdio } from 'node:child_process'
import { createInterface } from 'node:readline'
import type { Readable } from 'node:stream'
import { fileURLToPath } from 'node:url'
import type { Run, Ran } from './cli-runner.ts'
import { forkOptions, nodeCommand } from './node-command.ts'

const MAIN = fileURLToPath(new URL('../../plugin/cli/main.js', import.meta.url))
const RUNNER = fileURLToPath(new URL('./cli-runner.js', import.meta.url))

/** Long enough for a process to end, also on a busy machine. */
const PATIENCE_MS = 60_000

/** Also when a test process is ended before its teardown, nothing it started may stay behind. */
const children = new Set<ChildProcess>()
const endChildren = (): void => { for (const child of children) child.kill('SIGKILL') }
process.once('exit', endChildren)
for (const signal of ['SIGTERM', 'SIGINT', 'SIGHUP'] as const) {
  process.once(signal, () => { endChildren(); process.exit(1) })
}

/** What ends with whatever started it: a test, or a script. */
export interface Ending {
  teardown (end: () => unknown): unknown
}

export interface CliServer {
  readonly url: string
  readonly child: ChildProcess
  /** What it has written to stderr so far. */
  stderr (): string
  /** Sends the signal and resolves with the exit code (null after a signal it did not handle). */
  stop (signal?: NodeJS.Signals): Promise<number | null>
}

export interface CliProcess {
  readonly process: ChildProcessByStdio<null, Readable, Readable>
  /** What it has written so far. */
  stdout (): string
  stderr (): string
  /** Its exit code; null after a signal it did not handle. */
  readonly ended: Promise<number | null>
  /** Sends the signal and resolves with the exit code. */
  stop (signal?: NodeJS.Signals): Promise<number | null>
}

/** Starts `fastify-epd ...args`. Ended at the test's teardown. */
export function spawnCli (t: Ending, args: readonly string[], env: NodeJS.ProcessEnv = {}): CliProcess {
  const command = nodeCommand([MAIN, ...args])
  const child = spawn(command.file, command.args, { stdio: ['ignore', 'pipe', 'pipe'], env: { ...process.env, ...env } })
  children.add(child)
  child.once('exit', () => { children.delete(child) })
  let stdout = ''
  let stderr = ''
  child.stdout.setEncoding('utf8').on('data', (text: string) => { stdout += text })
  child.stderr.setEncoding('utf8').on('data', (text: string) => { stderr += text })
  const ended = new Promise<number | null>(resolve => child.once('exit', resolve))
  const stop = async (signal: NodeJS.Signals = 'SIGTERM'): Promise<number | null> => {
    if (child.exitCode !== null || child.signalCode !== null) return await ended
    child.kill(signal)
    let late = false
    const timer = setTimeout(() => { late = child.kill('SIGKILL') }, PATIENCE_MS)
    const code = await ended
    clearTimeout(timer)
    if (late) throw new Error(`fastify-epd ${args.join(' ')} (${child.pid}) did not end within ${PATIENCE_MS} ms of ${signal}:\n${stderr}`)
    return code
  }
  t.teardown(() => stop())
  return { process: child, stdout: () => stdout, stderr: () => stderr, ended, stop }
}

/** Starts `fastify-epd ...args` and resolves when it prints its URL. Ended at the test's teardown. */
export async function startCli (t: Ending, args: readonly string[], env: NodeJS.ProcessEnv = {}): Promise<CliServer> {
  const { process: child, stderr, ended, stop } = spawnCli(t, args, env)
  const url = await new Promise<string>((resolve, reject) => {
    createInterface({ input: child.stdout }).on('line', line => {
      const found = /^listening on (\S+)$/.exec(line)
      if (found) resolve(found[1]!)
    })
    ended.then(code => { reject(new Error(`fastify-epd ${args.join(' ')} ended with ${code}:\n${stderr()}`)) })
  })
  return { url, child, stderr, stop }
}

export interface CliResult { readonly code: number | null, readonly stdout: string, readonly stderr: string }

/** Runs `fastify-epd ...args` to its end, in a process of its own. */
export async function runCli (args: readonly string[], options: { env?: NodeJS.ProcessEnv, cwd?: string } = {}): Promise<CliResult> {
  const command = nodeCommand([MAIN, ...args])
  const child = spawn(command.file, command.args, {
    stdio: ['ignore', 'pipe', 'pipe'], env: { ...process.env, ...options.env }, ...(options.cwd === undefined ? {} : { cwd: options.cwd })
  })
  let stdout = ''
  let stderr = ''
  child.stdout.setEncoding('utf8').on('data', (text: string) => { stdout += text })
  child.stderr.setEncoding('utf8').on('data', (text: string) => { stderr += text })
  const code = await new Promise<number | null>(resolve => child.once('close', resolve))
  return { code, stdout, stderr }
}

let runner: ChildProcess | undefined
let last: Promise<unknown> = Promise.resolve()

/**
 * The same in one process for all calls of a test file, one after the other: starting a process costs a hundred times what
 * most commands do. For commands that end by themselves.
 */
export async function runCommand (args: readonly string[], { env = {}, cwd = process.cwd() }: { env?: NodeJS.ProcessEnv, cwd?: string } = {}): Promise<CliResult> {
  const ran = last.then(() => inRunner({ args, env: { ...process.env, ...env }, cwd }))
  last = ran.catch(() => {})
  return await ran
}

async function inRunner (run: Run): Promise<Ran> {
  const child = runner ??= startRunner()
  child.ref()
  child.channel?.ref()
  try {
    return await new Promise<Ran>((resolve, reject) => {
      const gone = (code: number | null): void => { runner = undefined; reject(new Error(`the process ended with ${code} in fastify-epd ${run.args.join(' ')}`)) }
      child.once('exit', gone)
      child.once('message', (ran: Ran) => { child.off('exit', gone); resolve(ran) })
      child.send(run)
    })
  } finally {
    child.unref()
    child.channel?.unref()
  }
}

function startRunner (): ChildProcess {
  const child = fork(RUNNER, { ...forkOptions(), stdio: ['ignore', 'ignore', 'inherit', 'ipc'] })
  children.add(child)
  return child
}
