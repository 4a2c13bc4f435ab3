import { spawn, spawnSync } from 'node:child_process'
import type { ChildProcess } from 'node:child_process'
import { cpus } from 'node:os'
import { fileURLToPath } from 'node:url'

const canPin = cpus().length > 1 && spawnSync('taskset', ['-V']).status === 0

/** How the processes were placed, for the report. */
export const PLACEMENT = canPin ? 'the proxy pinned to one core, upstream and load to another' : 'processes not pinned (no taskset)'

/** The command, held to these cores where that is possible. */
export function pinned (cores: number | string, command: readonly string[]): readonly string[] {
  return canPin ? ['taskset', '-c', String(cores), ...command] : command
}

/** A helper process that answers requests over IPC: `{ id, method, args }` -> `{ id, value }`. */
export class Peer {
  readonly #child: ChildProcess
  readonly #waiting = new Map<number, (answer: { value?: unknown, error?: string }) => void>()
  #next = 0

  /** @param cores - the CPU core it is pinned to, or a list of them, where that is possible. */
  constructor (script: URL, args: readonly string[], cores: number | string) {
    const full = pinned(cores, [process.execPath, ...process.execArgv, fileURLToPath(script), ...args])
    this.#child = spawn(full[0]!, full.slice(1), { stdio: ['ignore', 'inherit', 'inherit', 'ipc'] })
    this.#child.on('message', (message: { id: number, value?: unknown, error?: string }) => {
      this.#waiting.get(message.id)?.(message)
      this.#waiting.delete(message.id)
    })
    this.#child.on('exit', code => {
      for (const settle of this.#waiting.values()) settle({ error: `${fileURLToPath(script)} ended with ${code}` })
      this.#waiting.clear()
    })
  }

  async call<T> (method: string, ...args: unknown[]): Promise<T> {
    const id = this.#next++
    const answer = await new Promise<{ value?: unknown, error?: string }>(resolve => {
      this.#waiting.set(id, resolve)
      this.#child.send({ id, method, args })
    })
    if (answer.error !== undefined) throw new Error(answer.error)
    return answer.value as T
  }

  close (): void {
    this.#child.kill('SIGKILL')
  }
}

/** The other side of {@link Peer}: serves these methods in this process. */
export function serve (methods: Readonly<Record<string, (...args: never[]) => unknown>>): void {
  process.on('message', ({ id, method, args }: { id: number, method: string, args: never[] }) => {
    Promise.resolve().then(() => methods[method]!(...args)).then(
      value => process.send!({ id, value }),
      (error: unknown) => process.send!({ id, error: String(error) })
    )
  })
  process.on('disconnect', () => process.exit())
}
