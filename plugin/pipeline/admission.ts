import type { CallSignal } from '../../adapters/adapter.ts'
import { ATTR } from '../../adapters/wire/semconv.ts'
import { Counter, type Histogram } from '../../adapters/wire/series.ts'
import { epdError } from '../errors.ts'
import type { AdmissionOptions } from '../options/index.ts'
import type { RegistrySnapshot } from '../registry/index.ts'

/** Vision work that asks to come in. */
export interface Work {
  /** Vision tokens. */
  readonly tokens: number
  readonly model: string
  /** Waiting requests of one are served in turn with those of others. */
  readonly tenant?: string | undefined
  /** Higher goes first. */
  readonly priority?: number | undefined
}

/** The right to have so many vision tokens in flight. */
export interface Pass {
  /** The encoders have done their part, or have none in this. */
  leaveEncoders (): void
  release (): void
}

/** What encoders of one model can do. */
export interface EncoderPool {
  /** How many are usable. */
  readonly encoders: number
  /** Vision tokens a second, of all of them; undefined before the first has been measured. */
  readonly rate: number | undefined
}

/** An encoder that has not been measured is taken for one like the others. */
export function encoderPool (snapshot: RegistrySnapshot, model: string): EncoderPool {
  const encoders = snapshot.nodes.filter(({ role, state, models }) => role === 'encoder' && state === 'healthy' && models.includes(model))
  const rates = encoders.flatMap(({ load: { rate } }) => rate ?? [])
  return { encoders: encoders.length, rate: rates.length === 0 ? undefined : rates.reduce((sum, rate) => sum + rate, 0) * encoders.length / rates.length }
}

/** Why a request is turned away: no room in the queue, what is ahead takes too long, it has waited too long, or another takes its place. */
type Refusal = 'queue_full' | 'too_long' | 'timeout' | 'displaced'

interface Waiter {
  readonly work: Work
  /** Tokens that its tenant will have had in, with this one: the fewest of a priority go first. */
  readonly turn: number
  admit (pass: Pass): void
  refuse (reason: Refusal): void
}

/** Vision tokens let in to each encoder before its rate is known. */
const UNMEASURED = 16_384
const MAX_RETRY_AFTER = 3_600

/**
 * Bounds the vision work in flight through this gateway: all of it by tokens; that of encoders also by the time they
 * need for it at their measured rate, so that requests wait here, not in an encoder, where its time limit runs.
 * Higher priorities go first, then tenants in turn (start-time fair queueing by tokens), then the first come. What
 * could not be let in within the time a request may wait is refused at once. Text-only requests never pass here. A request
 * larger than a bound is let in when nothing else is in flight: it could never fit otherwise.
 */
export class Admission {
  #options: AdmissionOptions
  readonly #pool: (model: string) => EncoderPool
  readonly #queue: Waiter[] = []
  #inFlight = 0
  /** Of encoders, by model. */
  readonly #encoding = new Map<string, number>()
  /** What each tenant in the queue has had, in tokens; it starts where the one served last stood. */
  readonly #turns = new Map<string, number>()
  #turn = 0
  /** By reason. */
  readonly refusals = new Counter(ATTR.reason)
  readonly #waits: Histogram | undefined

  /** @param waits get the time that each request waited */
  constructor (options: AdmissionOptions, pool: (model: string) => EncoderPool, waits?: Histogram) {
    this.#options = options
    this.#waits = waits
    this.#pool = pool
  }

  /** Other bounds, at once. */
  configure (options: AdmissionOptions): void {
    this.#options = options
    this.#next()
  }

  get stats (): { readonly inFlight: number, readonly waiting: number, readonly refused: number } {
    return { inFlight: this.#inFlight, waiting: this.#queue.length, refused: this.refusals.total }
  }

  /** @throws EPD_ERR_OVERLOADED when the queue is full or the wait is too long; the signal's reason when it aborts */
  async enter (work: Work, signal: CallSignal): Promise<Pass> {
    if (!this.#queue.some(({ work: { model } }) => model === work.model) && this.#fits(work)) {
      this.#waits?.record(0, ['admitted'])
      return this.#pass(work)
    }
    const ahead = this.#queue.filter(waiter => goesBefore(waiter, work, this.#turnOf(work)))
    if (this.#expectedWait(work, ahead) * 1000 > this.#options.wait) throw this.#overloaded(work, ahead, 'too_long')
    if (this.#queue.length >= this.#options.queue && !this.#makeRoom(work)) throw this.#overloaded(work, ahead, 'queue_full')
    return await this.#wait(work, signal)
  }

  #fits ({ tokens, model }: Work): boolean {
    const { visionTokens } = this.#options
    if (visionTokens > 0 && this.#inFlight > 0 && this.#inFlight + tokens > visionTokens) return false
    const encoding = this.#encoding.get(model) ?? 0
    return encoding === 0 || encoding + tokens <= this.#share(this.#pool(model))
  }

  /** Vision tokens that the encoders may have in flight. */
  #share ({ encoders, rate }: EncoderPool): number {
    if (encoders === 0) return Infinity
    return rate === undefined ? encoders * UNMEASURED : rate * this.#options.encoderTime / 1000
  }

  /** Seconds until the encoders have taken what is ahead, in flight and waiting. 0 where their rate is unknown. */
  #expectedWait ({ tokens, model }: Work, ahead: readonly Waiter[]): number {
    const pool = this.#pool(model)
    if (pool.rate === undefined || pool.encoders === 0) return 0
    const waiting = ahead.reduce((sum, { work }) => work.model === model ? sum + work.tokens : sum, 0)
    return Math.max(0, (this.#encoding.get(model) ?? 0) + waiting + tokens - this.#share(pool)) / pool.rate
  }

  #turnOf ({ tenant = '', tokens }: Work): number {
    return Math.max(this.#turn, this.#turns.get(tenant) ?? 0) + tokens
  }

  /** Sends away the last of those who would go after the newcomer, so that one tenant's flood fills no queue of others. */
  #makeRoom (work: Work): boolean {
    const turn = this.#turnOf(work)
    const last = this.#queue.at(-1)
    if (last === undefined || goesBefore(last, work, turn)) return false
    last.refuse('displaced')
    return true
  }

  #pass ({ tokens, model }: Work): Pass {
    this.#inFlight += tokens
    this.#encoding.set(model, (this.#encoding.get(model) ?? 0) + tokens)
    let held = true
    let encoding = true
    const leaveEncoders = (): void => {
      if (!encoding) return
      encoding = false
      const left = this.#encoding.get(model)! - tokens
      if (left > 0) this.#encoding.set(model, left)
      else this.#encoding.delete(model)
    }
    return {
      leaveEncoders: () => {
        leaveEncoders()
        this.#next()
      },
      release: () => {
        if (!held) return
        held = false
        leaveEncoders()
        this.#inFlight -= tokens
        this.#next()
      }
    }
  }

  #wait (work: Work, signal: CallSignal): Promise<Pass> {
    return new Promise((resolve, reject) => {
      const since = performance.now()
      const stop = (outcome: 'admitted' | 'refused' | 'left'): void => {
        this.#waits?.record((performance.now() - since) / 1_000, [outcome])
        clearTimeout(timer)
        signal.removeEventListener('abort', onAbort)
        this.#queue.splice(this.#queue.indexOf(waiter), 1)
        if (this.#queue.length === 0) this.#turns.clear()
      }
      const leave = (reason: Error, outcome: 'refused' | 'left'): void => {
        stop(outcome)
        reject(reason)
        // The one behind may fit where this one did not.
        this.#next()
      }
      const turn = this.#turnOf(work)
      const waiter: Waiter = {
        work,
        turn,
        admit: pass => { stop('admitted'); resolve(pass) },
        refuse: reason => { leave(this.#overloaded(work, this.#queue, reason), 'refused') }
      }
      const onAbort = (): void => { leave(signal.reason as Error, 'left') }
      const timer = setTimeout(() => { waiter.refuse('timeout') }, this.#options.wait)
      signal.addEventListener('abort', onAbort)
      this.#turns.set(work.tenant ?? '', turn)
      const at = this.#queue.findIndex(other => !goesBefore(other, work, turn))
      this.#queue.splice(at === -1 ? this.#queue.length : at, 0, waiter)
    })
  }

  #next (): void {
    // A request that does not fit holds up those of its model.
    const held = new Set<string>()
    for (const waiter of [...this.#queue]) {
      const { work } = waiter
      if (held.has(work.model)) continue
      if (this.#fits(work)) {
        this.#turn = Math.max(this.#turn, waiter.turn - work.tokens)
        waiter.admit(this.#pass(work))
      } else held.add(work.model)
    }
  }

  #overloaded (work: Work, ahead: readonly Waiter[], reason: Refusal): Error {
    this.refusals.add(1, reason)
    const retryAfter = Math.max(this.#options.retryAfter, Math.min(MAX_RETRY_AFTER, Math.ceil(this.#expectedWait(work, ahead))))
    return epdError('EPD_ERR_OVERLOADED', [], { retryAfter })
  }
}

function goesBefore ({ work, turn }: Waiter, other: Work, othersTurn: number): boolean {
  const difference = (work.priority ?? 0) - (other.priority ?? 0)
  return difference !== 0 ? difference > 0 : turn <= othersTurn
}
