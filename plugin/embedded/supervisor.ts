import { statSync } from 'node:fs'
import type { Log } from '../../adapters/adapter.ts'
import { Backoff } from '../../adapters/wire/backoff.ts'
import { missingEnginePackages } from '../../adapters/wire/engine-packages.ts'
import type { EmbeddedEngines } from '../options/index.ts'
import { startEngineChild, type EngineChild } from './child.ts'

export interface SupervisorOptions {
  readonly config: EmbeddedEngines
  /** Where the engines register. */
  readonly proxyUrl: string
  readonly log: Log
  /** Called when an engine is up, and again after each restart. */
  readonly onUp: (name: string, url: string) => void
}

export interface Supervisor {
  /** Resolves when all engines have been up once; rejects when one can't be started. */
  readonly ready: Promise<void>
  pids (): number[]
  close (): Promise<void>
}

const STOP_GRACE_MS = 5_000
const FIRST_PAUSE_MS = 200
const LONGEST_PAUSE_MS = 10_000
/** After this long an engine has recovered, and its next restart is prompt again. */
const STEADY_MS = 30_000

interface Slot { readonly name: string, readonly args: string[], child?: EngineChild, backoff: Backoff, timer?: NodeJS.Timeout }

/** Starts the engines, restarts those that die, and ends them all with `close()`. */
export function superviseEngines (options: SupervisorOptions): Supervisor {
  const slots = slotsOf(options)
  let closing = false

  async function run (slot: Slot): Promise<void> {
    const child = startEngineChild(slot.args, line => { logLine(options.log, slot.name, line) })
    slot.child = child
    const since = performance.now()
    child.exited.then(how => { restart(slot, how, performance.now() - since) })
    options.onUp(slot.name, await child.url)
  }

  function restart (slot: Slot, how: string, livedMs: number): void {
    if (closing) return
    if (livedMs > STEADY_MS) slot.backoff.reset()
    const pause = slot.backoff.pause()
    options.log.warn({ engine: slot.name, how, again_in_ms: pause }, 'embedded engine ended; starting it again')
    slot.timer = setTimeout(() => { run(slot).catch((err: unknown) => { options.log.error({ engine: slot.name, err }, 'embedded engine did not start') }) }, pause)
  }

  const ready = Promise.all(slots.map(run)).then(() => {})
  ready.catch(() => {})
  return {
    ready,
    pids: () => slots.flatMap(slot => slot.child ? [slot.child.pid] : []),
    async close () {
      closing = true
      await Promise.all(slots.map(async slot => {
        clearTimeout(slot.timer)
        await slot.child?.stop(STOP_GRACE_MS)
      }))
    }
  }
}

/** Why engines can't start, however often one tries: the option at fault, and the folder that is not there. Undefined: nothing is known. */
export function hindrance ({ model }: EmbeddedEngines): { readonly why: string, readonly folder?: string } | undefined {
  const missing = missingEnginePackages()
  if (missing !== undefined) return { why: `embedded: ${missing}` }
  return model === undefined || statSync(model, { throwIfNoEntry: false })?.isDirectory() === true ? undefined : { why: 'embedded.model: no such folder', folder: model }
}

function slotsOf ({ config, proxyUrl }: SupervisorOptions): Slot[] {
  // The engines of one machine share its cores.
  const sharing = String(config.encoders + config.engines + config.prefill + config.decode)
  const common = ['--host', '127.0.0.1', '--port', '0', '--proxy-url', proxyUrl, '--sharing', sharing, ...(config.model === undefined ? [] : ['--model', config.model])]
  const slot = (name: string, ...args: string[]): Slot => ({ name, args: [...args, ...common], backoff: new Backoff(FIRST_PAUSE_MS, LONGEST_PAUSE_MS) })
  const slots = (count: number, name: string, role: string, backend = 'pytorch'): Slot[] =>
    Array.from({ length: count }, (_, i) => slot(`${name} ${i + 1}`, '--role', role, '--backend', backend))
  return [
    ...slots(config.encoders, 'encoder', 'encoder'),
    ...slots(config.engines, 'engine', 'hybrid', config.backend),
    ...slots(config.prefill, 'prefill', 'prefill'),
    ...slots(config.decode, 'decode', 'decode')
  ]
}

/** Levels of pino. */
const WARN = 40
const ERROR = 50

/** Logs a line of an engine's log: warnings and errors with all their fields, everything else as debug output. */
function logLine (log: Log, engine: string, line: string): void {
  const { level, msg, time: _time, pid: _pid, hostname: _hostname, ...facts } = recordOf(line)
  if (typeof level !== 'number' || level < WARN || typeof msg !== 'string') log.debug({ engine }, line)
  else if (level < ERROR) log.warn({ engine, ...facts }, msg)
  else log.error({ engine, ...facts }, msg)
}

/** The fields of a line; none for a line that is not JSON, such as a native library's own output. */
function recordOf (line: string): Record<string, unknown> {
  if (!line.startsWith('{')) return {}
  try {
    return JSON.parse(line) as Record<string, unknown>
  } catch {
    return {}
  }
}
