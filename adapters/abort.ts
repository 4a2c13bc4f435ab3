/** How a call ends before its answer: its signal with a time limit, and a wait that ends with the signal. */
import type { CallSignal } from './adapter.ts'

/** The longest delay a timer of Node.js takes, in milliseconds; a longer one would fire at once. */
const MAX_DELAY = 2 ** 31 - 1

/**
 * The signal of one call: it aborts when the time is up, when `parent` does, or by hand. Call `clear` when the call has
 * ended. Not an AbortController: on Node.js 20 one with its listeners and garbage adds 14 % to the CPU of a text request.
 */
export class TimeLimit implements CallSignal {
  aborted = false
  reason: unknown
  timedOut = false
  readonly #listeners: Array<() => void> = []
  readonly #parent: CallSignal | undefined
  readonly #onParent = (): void => { this.abort(this.#parent!.reason) }
  #timer: NodeJS.Timeout | undefined
  #ms = 0

  /** @param ms - 0 for no limit */
  constructor (ms: number, parent?: CallSignal) {
    this.#parent = parent
    if (parent?.aborted === true) this.abort(parent.reason)
    else {
      parent?.addEventListener('abort', this.#onParent)
      if (ms > 0) this.restart(ms)
    }
  }

  addEventListener (_type: 'abort', listener: () => void): void {
    this.#listeners.push(listener)
  }

  removeEventListener (_type: 'abort', listener: () => void): void {
    const at = this.#listeners.indexOf(listener)
    if (at !== -1) this.#listeners.splice(at, 1)
  }

  /** Counts from now on, `ms` milliseconds. */
  restart (ms: number): void {
    if (this.#timer !== undefined && ms === this.#ms) {
      this.#timer.refresh()
      return
    }
    clearTimeout(this.#timer)
    this.#ms = ms
    this.#timer = setTimeout(() => {
      this.timedOut = true
      this.abort(new DOMException(`nothing came for ${Math.round(ms)} ms`, 'TimeoutError'))
    }, Math.min(ms, MAX_DELAY))
  }

  abort (reason: unknown): void {
    this.clear()
    if (this.aborted) return
    this.aborted = true
    this.reason = reason
    for (const listener of this.#listeners.splice(0)) listener()
  }

  /** No limit from here on. `abort` still works. */
  clear (): void {
    clearTimeout(this.#timer)
    this.#timer = undefined
    this.#parent?.removeEventListener('abort', this.#onParent)
  }
}

/** A real AbortSignal for APIs that insist on one, such as `fetch`. */
export function abortSignalOf (signal: CallSignal): AbortSignal {
  if (signal instanceof AbortSignal) return signal
  const controller = new AbortController()
  if (signal.aborted) controller.abort(signal.reason)
  else signal.addEventListener('abort', () => { controller.abort(signal.reason) })
  return controller.signal
}

/** The reason of an aborted signal, wrapped in an Error when `abort` was given something else. */
export function abortReason (signal: CallSignal | undefined): Error {
  const reason = signal?.reason
  return reason instanceof Error ? reason : new Error(String(reason))
}

/**
 * The work's outcome, or the signal's reason as soon as it aborts: work that ignores its signal holds no caller up. A
 * result that comes after that goes to `late`.
 */
export function abortable<T> (work: Promise<T>, signal: CallSignal | undefined, late?: (value: T) => void): Promise<T> {
  if (signal === undefined) return work
  return new Promise((resolve, reject) => {
    const onAbort = (): void => { reject(abortReason(signal)) }
    if (signal.aborted) onAbort()
    else signal.addEventListener('abort', onAbort)
    work.then(value => {
      signal.removeEventListener('abort', onAbort)
      if (signal.aborted) late?.(value)
      else resolve(value)
    }, (error: unknown) => {
      signal.removeEventListener('abort', onAbort)
      reject(error)
    })
  })
}
