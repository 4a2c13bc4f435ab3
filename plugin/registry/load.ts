/** How a node is used, and what the uses show of its health: load, tickets, circuit breakers. */
import { AdapterError, type Stage } from '../../adapters/adapter.ts'
import type { RegistryOptions, Ticket } from './api.ts'
import { remembered, those } from './remembered.ts'
import type { Breakers, BreakerState, NodeLoad, NodeSnapshot, Verdict } from './types.ts'

const healthyOf = remembered((pool: readonly NodeSnapshot[]) => pool.filter(({ state }) => state === 'healthy'))
/** Each reads one member: a name that varies would take four times as long. */
const CLOSED: Readonly<Record<Stage, (node: NodeSnapshot) => boolean>> = {
  encode: ({ breakers }) => breakers.encode !== 'open',
  prefill: ({ breakers }) => breakers.prefill !== 'open',
  decode: ({ breakers }) => breakers.decode !== 'open'
}

/**
 * The nodes of one pool (a model's of one role) that may be asked at this stage: healthy ones whose breaker is not open.
 * Where that leaves less than `panic` percent of the healthy ones, or none, all of these are asked: so many at once are
 * rarely sick, and the last node is better than none. (Envoy's panic threshold.)
 */
export function usableOf (pool: readonly NodeSnapshot[], stage: Stage, panic: number): readonly NodeSnapshot[] {
  const healthy = healthyOf(pool)
  const closed = those(healthy, CLOSED[stage])
  return closed.length > 0 && closed.length * 100 >= healthy.length * panic ? closed : healthy
}

/**
 * closed -> (failures in a row) -> open -> (cooldown) -> half-open -> one trial -> closed or open.
 * While the trial runs the state reads `open`, so that no second request takes it.
 */
export class Breaker {
  readonly #failures: number
  readonly #cooldown: number
  #inRow = 0
  #openedAt: number | undefined
  #trial = false

  constructor (failures: number, cooldown: number) {
    this.#failures = failures
    this.#cooldown = cooldown
  }

  get state (): BreakerState {
    if (this.#openedAt === undefined) return 'closed'
    if (this.#trial || performance.now() - this.#openedAt < this.#cooldown) return 'open'
    return 'half-open'
  }

  /** Milliseconds until an open breaker lets a trial through. */
  get rest (): number {
    return this.#openedAt === undefined ? 0 : Math.max(0, this.#openedAt + this.#cooldown - performance.now())
  }

  /** A use begins; true when its outcome decides: it is the trial, or is sent although the breaker is open. */
  begin (): boolean {
    if (this.#openedAt === undefined) return false
    this.#trial ||= this.state === 'half-open'
    return true
  }

  end (verdict: Verdict, decides: boolean): void {
    if (decides) this.#trial = false
    if (verdict === 'alive') {
      // Other good answers may come from before it opened.
      if (this.#openedAt === undefined || decides) this.reset()
    } else if (verdict === 'failed') {
      this.#inRow++
      if (decides || (this.#openedAt === undefined && this.#inRow >= this.#failures)) this.#openedAt = performance.now()
    }
  }

  reset (): void {
    this.#inRow = 0
    this.#openedAt = undefined
    this.#trial = false
  }
}

/** A node's breakers, one per stage; readable as {@link Breakers}. */
export class StageBreakers implements Breakers {
  readonly #of: Readonly<Record<Stage, Breaker>>

  constructor (failures: number, cooldown: number) {
    const breaker = (): Breaker => new Breaker(failures, cooldown)
    this.#of = { encode: breaker(), prefill: breaker(), decode: breaker() }
  }

  get encode (): BreakerState { return this.#of.encode.state }
  get prefill (): BreakerState { return this.#of.prefill.state }
  get decode (): BreakerState { return this.#of.decode.state }

  of (stage: Stage): Breaker {
    return this.#of[stage]
  }

  reset (): void {
    for (const breaker of Object.values(this.#of)) breaker.reset()
  }
}

/** How many LMDeploy keeps. */
const LATENCIES = 15
/** Weight of the last measurement of a rate. */
const RECENT = 0.2
/** A node that has failed comes behind others for so long, or until it does well, in milliseconds. */
const SETBACK = 2_000
/** Connections that break within this time of one another broke of the same thing, in milliseconds. */
const SAME_BREAK = 2_000
/** Of requests that went out within this time before the last one, any may have reached the node first, in milliseconds. */
const AT_ONCE = 25

/** What a node's uses show is passed on to. */
export interface UseListener {
  /** It should be probed. */
  failed (): void
  breaker (stage: Stage, state: BreakerState): void
  /** Is the process alive with which the use began? Asks it. */
  alive (): Promise<boolean>
}

/**
 * What is in flight on a node. A use counts in the process it began with: after a restart the count starts at zero, and
 * tickets of the old process end without touching it.
 */
export class Load implements NodeLoad {
  static #uses = 0
  #counts = { requests: 0, active: 0, tokens: 0, work: 0 }
  #usedAt = 0
  #latencies: number[] = []
  #rate: number | undefined
  #failedAt = -Infinity
  /** The last connection that broke: when, and when the last of the requests began that broke with it. */
  #break = { at: -Infinity, began: -Infinity }

  get requests (): number { return this.#counts.requests }
  get active (): number { return this.#counts.active }
  get tokens (): number { return this.#counts.tokens }
  get work (): number { return this.#counts.work }
  get usedAt (): number { return this.#usedAt }
  get rate (): number | undefined { return this.#rate }
  get failing (): boolean { return performance.now() - this.#failedAt < SETBACK }
  /** Seconds, oldest first. */
  get latencies (): readonly number[] { return this.#latencies }

  take (node: string, stage: Stage, tokens: number, work: number, breaker: Breaker, listener: UseListener, stages?: RegistryOptions['stages']): Ticket {
    const counts = this.#counts
    const before = counts.tokens
    const release = this.reserve(tokens, work)
    let decides = breaker.begin()
    counts.active++
    const start = performance.now()
    let ended = false
    const judge = (verdict: Verdict): void => {
      if (counts !== this.#counts) return
      if (verdict !== 'unclear') this.#failedAt = verdict === 'failed' ? performance.now() : -Infinity
      const before = breaker.state
      breaker.end(verdict, decides)
      decides = false
      if (breaker.state !== before) listener.breaker(stage, breaker.state)
      if (verdict === 'failed') listener.failed()
    }
    return {
      node,
      stage,
      // A trial is over. The end of a use counts all the same: a node may break off whatever it begins.
      ok: () => { if (decides) judge('alive') },
      encoded: own => {
        if (counts !== this.#counts || own === 0) return
        // What was in flight before had its turn first.
        const rate = (before + own) * 1000 / (performance.now() - start)
        this.#rate = this.#rate === undefined ? rate : this.#rate + RECENT * (rate - this.#rate)
      },
      end: (error?: unknown, verdict: Verdict = error === undefined ? 'alive' : 'unclear') => {
        if (ended) return
        ended = true
        counts.active--
        release()
        judge(verdict)
        const seconds = (performance.now() - start) / 1000
        if (error === undefined && counts === this.#counts) this.#latencies = [...this.#latencies, seconds].slice(-LATENCIES)
        // A call that was aborted says nothing about the node.
        stages?.record(seconds, [stage, node, error === undefined ? 'ok' : AdapterError.is(error) ? error.code.toLowerCase() : 'aborted'])
      },
      killed: async known => {
        const now = performance.now()
        this.#break = { at: now, began: now - this.#break.at > SAME_BREAK ? start : Math.max(start, this.#break.began) }
        // Every connection that broke with this one is known when the answer is there.
        const alive = await listener.alive()
        return (known || !alive) && start >= this.#break.began - AT_ONCE
      }
    }
  }

  /** Counts one request. @returns ends it; the first call counts */
  reserve (tokens: number, work: number): () => void {
    const counts = this.#counts
    let held = true
    this.#usedAt = ++Load.#uses
    counts.requests++
    counts.tokens += tokens
    counts.work += work
    return () => {
      if (!held) return
      held = false
      counts.requests--
      counts.tokens -= tokens
      counts.work -= work
    }
  }

  reset (): void {
    this.#counts = { requests: 0, active: 0, tokens: 0, work: 0 }
    this.#latencies = []
    this.#rate = undefined
    this.#failedAt = -Infinity
  }
}
