import type { CallEnd } from '../../adapters/adapter.ts'
import type { Alarm, Deadlines } from './deadlines.ts'
import type { Linked } from './linked-list.ts'

/**
 * The life of one upstream call: its signal, its timeout, its end. `run` rejects as soon as the scope is aborted, even
 * if an adapter does not heed its signal, so that a hanging call never holds the request; what such a call brings
 * later is handed to `late`. Itself as much of a signal as our own adapters need: an AbortController with a listener
 * costs as much as routing a text request.
 */
export class CallScope implements Alarm, CallEnd {
  at: number
  timedOut = false
  aborted = false
  reason: unknown
  before: Linked | undefined
  after: Linked | undefined
  #controller: AbortController | undefined
  #listener: (() => void) | undefined
  #others: Array<() => void> | undefined
  readonly #deadlines: Deadlines
  #reject: ((reason: unknown) => void) | undefined
  #watch: { expired (): boolean } | undefined

  /** @param at when it times out, on the clock of `performance.now()` */
  constructor (deadlines: Deadlines, at: number) {
    this.at = at
    this.#deadlines = deadlines
    deadlines.add(this)
  }

  /** For whoever needs a real one. */
  get signal (): AbortSignal {
    if (this.#controller === undefined) {
      this.#controller = new AbortController()
      if (this.aborted) this.#controller.abort(this.reason)
    }
    return this.#controller.signal
  }

  addEventListener (_type: 'abort', listener: () => void): void {
    if (this.#listener === undefined) this.#listener = listener
    else (this.#others ??= []).push(listener)
  }

  removeEventListener (_type: 'abort', listener: () => void): void {
    if (this.#listener === listener) this.#listener = undefined
    else this.#others = this.#others?.filter(other => other !== listener)
  }

  ring (): void {
    if (this.#watch?.expired() === false) return
    this.timedOut = true
    this.abort(new DOMException('The call timed out', 'TimeoutError'))
  }

  abort (reason: unknown): void {
    this.#deadlines.delete(this)
    if (this.aborted) return
    this.aborted = true
    this.reason = reason
    // First the waiting caller, then the adapter: whoever waits sees this reason, not what the adapter makes of it.
    this.#reject?.(reason)
    this.#controller?.abort(reason)
    const others = this.#others
    this.#listener?.()
    if (others !== undefined) for (const listener of others) listener()
  }

  /** The timeout no longer applies; the signal stays. */
  disarm (): void {
    this.#deadlines.delete(this)
  }

  /** Asked when the time is up whether it really is; it may set the timeout anew. */
  watch (watch: { expired (): boolean }): void {
    this.#watch = watch
  }

  /** Sets the timeout anew. */
  rearm (at: number): void {
    this.at = at
    this.#deadlines.add(this)
  }

  run<T> (call: () => Promise<T>, late: (value: T) => void): Promise<T> {
    return new Promise<T>((resolve, reject) => {
      if (this.aborted) throw this.reason
      this.#reject = reject
      call().then(value => {
        this.#reject = undefined
        if (this.aborted) late(value)
        else resolve(value)
      }, reject)
    })
  }
}
