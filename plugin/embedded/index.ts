/**
 * The embedded default: engines of our own as child processes on free ports. They register over HTTP like any other
 * node; there is no second path through the code for them.
 */
import type { Log } from '../../adapters/adapter.ts'
import { startEngineChild, type EngineChild } from './child.ts'
import { passOn } from './engine-log.ts'

export interface EmbeddedConfig {
  readonly encoders: number
  readonly engines: number
  /** Engines that only prefill, and only decode. */
  readonly prefill: number
  readonly decode: number
  readonly backend: 'pytorch' | 'turbomind'
  /** Model folder; the shipped tiny model when absent. */
  readonly model?: string | undefined
}

export interface EmbeddedOptions {
  readonly config: EmbeddedConfig
  /** Where the engines register, with the plugin's prefix. */
  readonly proxyUrl: string
  readonly log: Log
  /** Told once an engine is up, and again when it was started anew. */
  readonly onUp?: (name: string, url: string) => void
}

export interface Embedded {
  /** All engines have been up once; rejects when one can't be started at all. */
  readonly ready: Promise<void>
  pids (): number[]
  close (): Promise<void>
}

const STOP_GRACE_MS = 5_000
const FIRST_PAUSE_MS = 200
const LONGEST_PAUSE_MS = 10_000
/** An engine that stayed up this long has recovered: the next restart is prompt again. */
const STEADY_MS = 30_000

interface Slot { readonly name: string, readonly args: string[], child?: EngineChild, pause: number, timer?: NodeJS.Timeout }

/** Starts the engines, starts those anew that die, ends them all with `close()`. */
export function startEmbedded (options: EmbeddedOptions): Embedded {
  const slots = slotsOf(options)
  let closing = false

  async function run (slot: Slot): Promise<void> {
    const child = startEngineChild(slot.args, line => { passOn(options.log, slot.name, line) })
    slot.child = child
    const since = performance.now()
    child.exited.then(how => { again(slot, how, performance.now() - since) })
    options.onUp?.(slot.name, await child.url)
  }

  function again (slot: Slot, how: string, livedMs: number): void {
    if (closing) return
    slot.pause = livedMs > STEADY_MS ? FIRST_PAUSE_MS : Math.min(slot.pause * 2, LONGEST_PAUSE_MS)
    options.log.warn({ engine: slot.name, how, again_in_ms: slot.pause }, 'embedded engine ended; starting it again')
    slot.timer = setTimeout(() => { run(slot).catch((err: unknown) => { options.log.error({ engine: slot.name, err }, 'embedded engine did not start') }) }, slot.pause)
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

function slotsOf ({ config, proxyUrl }: EmbeddedOptions): Slot[] {
  // The engines of one machine share its cores: each is told how many there are.
  const sharing = String(config.encoders + config.engines + config.prefill + config.decode)
  const common = ['--host', '127.0.0.1', '--port', '0', '--proxy-url', proxyUrl, '--sharing', sharing, ...(config.model === undefined ? [] : ['--model', config.model])]
  const slot = (name: string, ...args: string[]): Slot => ({ name, args: [...args, ...common], pause: FIRST_PAUSE_MS })
  const slots = (count: number, name: string, role: string, backend = 'pytorch'): Slot[] =>
    Array.from({ length: count }, (_, i) => slot(`${name} ${i + 1}`, '--role', role, '--backend', backend))
  return [
    ...slots(config.encoders, 'encoder', 'encoder'),
    ...slots(config.engines, 'engine', 'hybrid', config.backend),
    ...slots(config.prefill, 'prefill', 'prefill'),
    ...slots(config.decode, 'decode', 'decode')
  ]
}
