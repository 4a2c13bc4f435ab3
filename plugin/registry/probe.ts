/** Health probes: when a node is probed, and whether its answer makes sense. */
import { ROLE_TO_WIRE, type NodeInfo } from '../../adapters/adapter.ts'

/** All in milliseconds. */
export interface ProbeTiming {
  readonly interval: number
  readonly backoff: number
  readonly backoffMax: number
  readonly timeout: number
}

/** `starting`: alive but not ready; the next probe follows soon, without growing pauses. `dead`: there is no process that listens. */
export type ProbeOutcome = 'well' | 'starting' | 'ill' | 'dead'

/** Varies a pause by up to a fifth, so that gateways and nodes started together do not stay in step. */
function jitter (ms: number): number {
  return ms * (0.8 + 0.4 * Math.random())
}

/** The first pause after a registration is shorter than the one after a failure by this factor. */
const EAGER = 8

/** Probes one node until it is closed, one probe at a time: at an interval while the node is well, with back-off while it is not. */
export class ProbeLoop {
  readonly #timing: ProbeTiming
  readonly #probe: (signal: AbortSignal) => Promise<ProbeOutcome>
  #timer: NodeJS.Timeout | undefined
  #running: Promise<void> | undefined
  #abort: AbortController | undefined
  #again = false
  #closed = false
  #delay: number
  /** Want to know the outcome of a probe that begins after they asked. */
  #asking: Array<(outcome: ProbeOutcome | 'closed') => void> = []

  /** @param probe - never rejects. */
  constructor (timing: ProbeTiming, probe: (signal: AbortSignal) => Promise<ProbeOutcome>) {
    this.#timing = timing
    this.#probe = probe
    this.#delay = timing.backoff / EAGER
  }

  /** Probes now; `eager`: soon again should that fail. A running probe is followed by another, because it may have begun before the news. */
  trigger (eager: boolean): void {
    if (this.#closed) return
    if (eager) this.#delay = this.#timing.backoff / EAGER
    if (this.#running !== undefined) {
      this.#again = true
      return
    }
    if (this.#timer !== undefined) clearTimeout(this.#timer)
    this.#running = this.#run()
  }

  /** The outcome of a probe from now on; `ill` when there is none in time. */
  async ask (ms: number): Promise<ProbeOutcome | 'closed'> {
    if (this.#closed) return 'closed'
    return await new Promise(resolve => {
      const timer = setTimeout(() => { resolve('ill') }, ms)
      this.#asking.push(outcome => { clearTimeout(timer); resolve(outcome) })
      this.trigger(false)
    })
  }

  async close (): Promise<void> {
    this.#closed = true
    for (const answer of this.#asking.splice(0)) answer('closed')
    if (this.#timer !== undefined) clearTimeout(this.#timer)
    this.#abort?.abort(new Error('the registry is closed'))
    await this.#running
  }

  async #run (): Promise<void> {
    const asking = this.#asking.splice(0)
    this.#abort = new AbortController()
    const { signal } = this.#abort
    const timer = setTimeout(() => { this.#abort?.abort(new Error(`no answer within ${this.#timing.timeout} ms`)) }, this.#timing.timeout).unref()
    const outcome = await this.#probe(signal)
    clearTimeout(timer)
    this.#running = undefined
    for (const answer of asking) answer(this.#closed ? 'closed' : outcome)
    if (this.#closed) return
    if (this.#again) {
      this.#again = false
      this.trigger(false)
      return
    }
    this.#timer = setTimeout(() => { this.trigger(false) }, jitter(this.#next(outcome))).unref()
  }

  #next (outcome: ProbeOutcome): number {
    const { interval, backoff, backoffMax } = this.#timing
    if (outcome === 'well' || outcome === 'starting') {
      this.#delay = backoff
      return outcome === 'well' ? interval : Math.min(backoff, interval)
    }
    const delay = this.#delay
    this.#delay = Math.min(backoffMax, delay * 2)
    return delay
  }
}

const STATUSES: readonly unknown[] = ['initialising', 'healthy', 'draining', 'sleeping'] satisfies Array<NodeInfo['status']>
const VISIONS: readonly unknown[] = ['full', 'features', 'none'] satisfies Array<NodeInfo['vision']>

type Check = (value: unknown) => boolean
const isText: Check = value => typeof value === 'string'
const isNumber: Check = value => typeof value === 'number' && !Number.isNaN(value)
const areTexts: Check = value => Array.isArray(value) && value.every(isText)
const areObjects: Check = value => Array.isArray(value) && value.every(one => typeof one === 'object' && one !== null)
const unless = (check: Check): Check => value => value === undefined || check(value)

const CHECKS: ReadonlyArray<readonly [keyof NodeInfo, Check]> = [
  ['status', value => STATUSES.includes(value)],
  ['role', value => isText(value) && Object.hasOwn(ROLE_TO_WIRE, value as string)],
  ['vision', value => VISIONS.includes(value)],
  ['backend', isText],
  ['models', areTexts],
  ['cards', unless(areObjects)],
  ['produces', areTexts],
  ['accepts', areTexts],
  ['notes', unless(areTexts)],
  ['version', unless(isText)],
  ['fingerprint', unless(isText)],
  ['epoch', unless(isNumber)],
  ['maxPrefillTokens', unless(isNumber)],
  ['standalone', unless(value => typeof value === 'boolean')],
  ['checkMedia', unless(value => typeof value === 'boolean')]
]

/**
 * Checks what a probe answers: it comes over the network, through an adapter that may be third-party. Unchecked, a
 * wrong member would fail later, in requests to other nodes.
 *
 * @throws TypeError that names the field
 */
export function checkedInfo (info: NodeInfo): NodeInfo {
  for (const [field, check] of CHECKS) {
    if (!check(info[field])) throw new TypeError(`the node's answers make no sense: ${field} is ${JSON.stringify(info[field]) ?? 'missing'}`)
  }
  return info
}
