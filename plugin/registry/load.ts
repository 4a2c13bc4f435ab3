import type { Stage } from '../../adapters/adapter.ts'
import { verdictOf, type Breaker } from './breaker.ts'
import type { NodeLoad, RegistryOptions, Ticket } from './types.ts'

/** As many as LMDeploy keeps. */
const LATENCIES = 15

interface Counts {
  requests: number
  tokens: number
}

/**
 * What is in flight on a node. Tickets count in the generation they were taken in: when a node turns out to be another
 * process, its count starts at nothing, and tickets of the old process end without touching it.
 */
export class Load implements NodeLoad {
  #counts: Counts = { requests: 0, tokens: 0 }
  #latencies: number[] = []

  get requests (): number { return this.#counts.requests }
  get tokens (): number { return this.#counts.tokens }
  /** Seconds, oldest first. */
  get latencies (): readonly number[] { return this.#latencies }

  take (node: string, stage: Stage, tokens: number, breaker: Breaker, onFailure: () => void, onUse?: RegistryOptions['onUse']): Ticket {
    const counts = this.#counts
    const trial = breaker.begin()
    const start = performance.now()
    let judged = false
    let ended = false
    counts.requests++
    counts.tokens += tokens
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
      end: (error?: unknown) => {
        if (ended) return
        ended = true
        counts.requests--
        counts.tokens -= tokens
        judge(error)
        const seconds = (performance.now() - start) / 1000
        if (error === undefined && counts === this.#counts) this.#note(seconds)
        onUse?.(node, stage, seconds, error)
      }
    }
  }

  /** As a ticket that is not in use yet. */
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
    this.#counts = { requests: 0, tokens: 0 }
    this.#latencies = []
  }

  #note (seconds: number): void {
    this.#latencies.push(seconds)
    if (this.#latencies.length > LATENCIES) this.#latencies.shift()
  }
}

/** For a node that was removed between plan and use. */
export function idleTicket (node: string, stage: Stage): Ticket {
  return { node, stage, ok: () => {}, end: () => {} }
}
