import { epdError } from '../errors.ts'
import type { AdmissionOptions } from '../options/index.ts'
import type { Alarm, Deadlines } from './deadlines.ts'

/** The right to have so many vision tokens in flight. */
export interface Pass {
  release (): void
}

export interface Waiting {
  readonly admitted: Promise<Pass>
  /** Leaves the queue; `admitted` rejects with the reason. Does nothing once admitted. */
  leave (reason: unknown): void
}

interface Waiter extends Alarm {
  readonly tokens: number
  readonly admit: (pass: Pass) => void
  readonly refuse: (reason: unknown) => void
}

/**
 * Bounds the vision tokens in flight through this gateway, first come, first served. Text-only requests never pass
 * here. A request larger than the bound is let in when nothing else is in flight: it could never fit otherwise.
 */
export class Admission {
  readonly #options: AdmissionOptions
  readonly #deadlines: Deadlines
  readonly #queue = new Set<Waiter>()
  #inFlight = 0
  #refused = 0

  constructor (options: AdmissionOptions, deadlines: Deadlines) {
    this.#options = options
    this.#deadlines = deadlines
  }

  get stats (): { readonly inFlight: number, readonly waiting: number, readonly refused: number } {
    return { inFlight: this.#inFlight, waiting: this.#queue.size, refused: this.#refused }
  }

  /** @throws EPD_ERR_OVERLOADED when the queue is full; `admitted` rejects with it when the wait was too long */
  enter (tokens: number): Pass | Waiting {
    if (this.#queue.size === 0 && this.#fits(tokens)) return this.#pass(tokens)
    if (this.#queue.size >= this.#options.queue) throw this.#overloaded()
    return this.#wait(tokens)
  }

  #fits (tokens: number): boolean {
    const { visionTokens } = this.#options
    return visionTokens === 0 || this.#inFlight === 0 || this.#inFlight + tokens <= visionTokens
  }

  #pass (tokens: number): Pass {
    this.#inFlight += tokens
    let held = true
    return {
      release: () => {
        if (!held) return
        held = false
        this.#inFlight -= tokens
        this.#next()
      }
    }
  }

  #wait (tokens: number): Waiting {
    let waiter: Waiter
    const admitted = new Promise<Pass>((resolve, reject) => {
      waiter = {
        tokens,
        admit: resolve,
        refuse: reject,
        at: performance.now() + this.#options.wait,
        ring: () => { this.#leave(waiter, this.#overloaded()) }
      }
      this.#queue.add(waiter)
      this.#deadlines.add(waiter)
    })
    return { admitted, leave: reason => { this.#leave(waiter, reason) } }
  }

  #leave (waiter: Waiter, reason: unknown): void {
    if (!this.#queue.delete(waiter)) return
    this.#deadlines.delete(waiter)
    waiter.refuse(reason)
    // The one behind may fit where this one did not.
    this.#next()
  }

  #next (): void {
    for (const waiter of this.#queue) {
      if (!this.#fits(waiter.tokens)) return
      this.#queue.delete(waiter)
      this.#deadlines.delete(waiter)
      waiter.admit(this.#pass(waiter.tokens))
    }
  }

  #overloaded (): Error {
    this.#refused++
    return epdError('EPD_ERR_OVERLOADED', [], { retryAfter: this.#options.retryAfter })
  }
}
