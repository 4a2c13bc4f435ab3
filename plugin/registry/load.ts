/** How a node is used, and what the uses show of its health: load, tickets, circuit breakers. */
import { AdapterError, type Stage } from '../../adapters/adapter.ts'
import type { RegistryOptions, Ticket } from './api.ts'
import type { Breakers, BreakerState, NodeLoad, NodeSnapshot } from './types.ts'

/** Healthy, and its breaker lets calls of this stage through. */
export function usable (node: NodeSnapshot, stage: Stage): boolean {
  return node.state === 'healthy' && node.breakers[stage] !== 'open'
}

/** What the end of a use shows of the node. */
export type Verdict = 'alive' | 'failed' | 'unclear'

/** A 4xx, a full node and lost features show a node that works; an aborted call and a pair that can't work together show nothing. */
export function verdictOf (error: unknown): Verdict {
  if (error === undefined) return 'alive'
  if (!AdapterError.is(error) || error.fault === 'pair') return 'unclear'
  return error.fault === 'node' ? 'failed' : 'alive'
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

  /** A use begins; true when it is the trial. */
  begin (): boolean {
    if (this.state !== 'half-open') return false
    this.#trial = true
    return true
  }

  end (verdict: Verdict, wasTrial: boolean): void {
    if (wasTrial) this.#trial = false
    if (verdict === 'alive') {
      // Only the trial closes an open breaker: other good answers may come from before it opened.
      if (this.#openedAt === undefined || wasTrial) this.reset()
    } else if (verdict === 'failed') {
      this.#inRow++
      if (wasTrial || (this.#openedAt === undefined && this.#inRow >= this.#failures)) this.#openedAt = performance.now()
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

/**
 * What is in flight on a node. A use counts in the process it began with: after a restart the count starts at zero, and
 * tickets of the old process end without touching it.
 */
export class Load implements NodeLoad {
  #counts = { requests: 0, active: 0, tokens: 0 }
  #latencies: number[] = []
  #rate: number | undefined

  get requests (): number { return this.#counts.requests }
  get active (): number { return this.#counts.active }
  get tokens (): number { return this.#counts.tokens }
  get rate (): number | undefined { return this.#rate }
  /** Seconds, oldest first. */
  get latencies (): readonly number[] { return this.#latencies }

  take (node: string, stage: Stage, tokens: number, breaker: Breaker, onFailure: () => void, metrics?: RegistryOptions['metrics']): Ticket {
    const counts = this.#counts
    const before = counts.tokens
    const release = this.reserve(tokens)
    const trial = breaker.begin()
    counts.active++
    const start = performance.now()
    let judged = false
    let ended = false
    const judge = (error?: unknown): void => {
      if (judged) return
      judged = true
      if (counts !== this.#counts) return
      const verdict = verdictOf(error)
      breaker.end(verdict, trial)
      if (verdict === 'failed') onFailure()
    }
    return {
      node,
      stage,
      ok: judge,
      encoded: own => {
        if (counts !== this.#counts || own === 0) return
        // What was in flight before had its turn first.
        const rate = (before + own) * 1000 / (performance.now() - start)
        this.#rate = this.#rate === undefined ? rate : this.#rate + RECENT * (rate - this.#rate)
      },
      end: (error?: unknown) => {
        if (ended) return
        ended = true
        counts.active--
        release()
        judge(error)
        const seconds = (performance.now() - start) / 1000
        if (error === undefined && counts === this.#counts) this.#latencies = [...this.#latencies, seconds].slice(-LATENCIES)
        metrics?.stage(node, stage, seconds, error)
      }
    }
  }

  /** Counts one request. @returns ends it; the first call counts */
  reserve (tokens: number): () => void {
    const counts = this.#counts
    let held = true
    counts.requests++
    counts.tokens += tokens
    return () => {
      if (!held) return
      held = false
      counts.requests--
      counts.tokens -= tokens
    }
  }

  reset (): void {
    this.#counts = { requests: 0, active: 0, tokens: 0 }
    this.#latencies = []
    this.#rate = undefined
  }
}

/** For a node that was removed between plan and use. */
export function idleTicket (node: string, stage: Stage): Ticket {
  return { node, stage, ok: () => {}, encoded: () => {}, end: () => {} }
}
