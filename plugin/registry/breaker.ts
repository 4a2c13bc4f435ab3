import { AdapterError, type Stage } from '../../adapters/adapter.ts'
import type { Breakers, BreakerState } from './types.ts'

/** What a use of a node tells of its health. */
export type Verdict = 'alive' | 'failed' | 'unclear'

/** A 4xx, a full node and lost features show a node that works; a call that was aborted shows nothing. */
export function verdictOf (error: unknown): Verdict {
  if (error === undefined) return 'alive'
  if (!AdapterError.is(error)) return 'unclear'
  if (error.code === 'UNAVAILABLE') return 'failed'
  return error.code === 'REFUSED' ? 'unclear' : 'alive'
}

/**
 * closed -> (failures in a row) -> open -> (cooldown) -> half-open -> one trial -> closed or open.
 * While the trial runs the state reads `open`, so that nobody else takes it.
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
      // A late good answer from before the breaker opened does not close it; only the trial does.
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
    this.#of = { encode: breaker(), migrate: breaker(), prefill: breaker(), decode: breaker() }
  }

  get encode (): BreakerState { return this.#of.encode.state }
  get migrate (): BreakerState { return this.#of.migrate.state }
  get prefill (): BreakerState { return this.#of.prefill.state }
  get decode (): BreakerState { return this.#of.decode.state }

  of (stage: Stage): Breaker {
    return this.#of[stage]
  }

  reset (): void {
    for (const breaker of Object.values(this.#of)) breaker.reset()
  }
}
