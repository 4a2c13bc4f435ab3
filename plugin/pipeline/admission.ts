import type { CallSignal } from '../../adapters/adapter.ts'
import { epdError } from '../errors.ts'
import type { AdmissionOptions } from '../options/index.ts'

/** The right to have so many vision tokens in flight. */
export interface Pass {
  release (): void
}

interface Waiter {
  readonly tokens: number
  admit (pass: Pass): void
}

/**
 * Bounds the vision tokens in flight through this gateway, first come, first served. Text-only requests never pass
 * here. A request larger than the bound is let in when nothing else is in flight: it could never fit otherwise.
 */
export class Admission {
  #options: AdmissionOptions
  readonly #queue = new Set<Waiter>()
  #inFlight = 0
  #refused = 0

  constructor (options: AdmissionOptions) {
    this.#options = options
  }

  /** Other bounds, at once. */
  configure (options: AdmissionOptions): void {
    this.#options = options
    this.#next()
  }

  get stats (): { readonly inFlight: number, readonly waiting: number, readonly refused: number } {
    return { inFlight: this.#inFlight, waiting: this.#queue.size, refused: this.#refused }
  }

  /** @throws EPD_ERR_OVERLOADED when the queue is full or the wait was too long; the signal's reason when it aborts */
  async enter (tokens: number, signal: CallSignal): Promise<Pass> {
    if (this.#queue.size === 0 && this.#fits(tokens)) return this.#pass(tokens)
    if (this.#queue.size >= this.#options.queue) throw this.#overloaded()
    return await this.#wait(tokens, signal)
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

  #wait (tokens: number, signal: CallSignal): Promise<Pass> {
    return new Promise((resolve, reject) => {
      const stop = (): void => {
        clearTimeout(timer)
        signal.removeEventListener('abort', onAbort)
        this.#queue.delete(waiter)
      }
      const leave = (reason: Error): void => {
        stop()
        reject(reason)
        // The one behind may fit where this one did not.
        this.#next()
      }
      const waiter: Waiter = { tokens, admit: pass => { stop(); resolve(pass) } }
      const onAbort = (): void => { leave(signal.reason as Error) }
      const timer = setTimeout(() => { leave(this.#overloaded()) }, this.#options.wait)
      signal.addEventListener('abort', onAbort)
      this.#queue.add(waiter)
    })
  }

  #next (): void {
    for (const waiter of this.#queue) {
      if (!this.#fits(waiter.tokens)) return
      waiter.admit(this.#pass(waiter.tokens))
    }
  }

  #overloaded (): Error {
    this.#refused++
    return epdError('EPD_ERR_OVERLOADED', [], { retryAfter: this.#options.retryAfter })
  }
}
