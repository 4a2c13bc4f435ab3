import { spawn, type ChildProcess } from 'node:child_process'
import { once } from 'node:events'
import { fileURLToPath } from 'node:url'
import { createInterface } from 'node:readline'

/** An embedded engine starts by the same command line as any other. */
const MAIN = new URL('../cli/main.js', import.meta.url)
const LISTENING = /^listening on (\S+)$/
/** Lines of an engine's output kept for the error message when it dies at once. */
const KEPT_LINES = 20

export interface EngineChild {
  readonly pid: number
  /** The URL it printed; rejects when it exits before. */
  readonly url: Promise<string>
  /** Resolves when the process is gone, with its exit code or signal in words. */
  readonly exited: Promise<string>
  /** SIGTERM, then SIGKILL after `graceMs`. Resolves when the process is gone. */
  stop (graceMs: number): Promise<void>
}

/**
 * Starts `fastify-epd engine ...args` as a child process. Its stdin is a pipe without data: when this process ends, even
 * by SIGKILL, the pipe closes and the engine ends too (`--exit-with-parent`).
 */
export function startEngineChild (args: readonly string[], onLog: (line: string) => void): EngineChild {
  const child = spawn(process.execPath, [fileURLToPath(MAIN), 'engine', '--exit-with-parent', ...args], { stdio: ['pipe', 'pipe', 'pipe'] })
  const exited = exit(child)
  const lines: string[] = []
  createInterface({ input: child.stderr }).on('line', line => {
    if (lines.push(line) > KEPT_LINES) lines.shift()
    onLog(line)
  })
  return { pid: child.pid ?? -1, url: listening(child, exited, lines), exited, stop: graceMs => stop(child, exited, graceMs) }
}

function exit (child: ChildProcess): Promise<string> {
  return new Promise(resolve => {
    child.once('error', err => { resolve(err.message) })
    child.once('exit', (code, signal) => { resolve(signal ?? `exit code ${code}`) })
  })
}

function listening (child: ChildProcess, exited: Promise<string>, lines: readonly string[]): Promise<string> {
  const url = new Promise<string>((resolve, reject) => {
    createInterface({ input: child.stdout! }).on('line', line => {
      const found = LISTENING.exec(line)
      if (found) resolve(found[1]!)
    })
    exited.then(how => { reject(new Error(`the engine ended before it was ready (${how})${lines.length > 0 ? ':\n  ' + lines.join('\n  ') : ''}`)) })
  })
  // A caller that only stops the child does not await `url`: its rejection must not end the process.
  url.catch(() => {})
  return url
}

async function stop (child: ChildProcess, exited: Promise<string>, graceMs: number): Promise<void> {
  if (child.exitCode !== null || child.signalCode !== null || child.pid === undefined) return
  child.kill('SIGTERM')
  const timer = setTimeout(() => { child.kill('SIGKILL') }, graceMs)
  try { await Promise.race([exited, once(child, 'exit')]) } finally { clearTimeout(timer) }
}
