import { P2PError, type P2PErrorCode } from './types.ts'
import type { ToWorker } from './messages.ts'
import type { WriteGate } from './write-gate.ts'

interface CallLimits {
  signal?: AbortSignal | undefined
  timeoutMs: number
  /** What is being done, for the message of a timeout. */
  what: string
  /** Given for a pull: closing it is what allows an aborted call to settle at once. */
  gate?: WriteGate
}

interface Pending {
  resolve: (value: unknown) => void
  reject: (error: P2PError) => void
  giveUp: (error: P2PError) => void
  /** Why the caller gave up, while the worker's last write is still awaited. */
  givenUp?: P2PError
}

/** Calls into the transfer worker: each settles exactly once, by its answer, its time limit, its signal, or the worker's end. */
export class WorkerCalls {
  readonly #post: (message: ToWorker) => void
  readonly #pending = new Map<number, Pending>()
  #last = 0

  constructor (post: (message: ToWorker) => void) {
    this.#post = post
  }

  run (message: (call: number) => ToWorker, limits: CallLimits): Promise<unknown> {
    const { signal, timeoutMs, what, gate } = limits
    if (signal?.aborted) return Promise.reject(aborted(what, signal))
    const call = ++this.#last
    return new Promise((resolve, reject) => {
      const clear = (): void => {
        clearTimeout(timer)
        signal?.removeEventListener('abort', onAbort)
        this.#pending.delete(call)
      }
      const pending: Pending = {
        resolve: (value) => {
          clear()
          if (pending.givenUp === undefined) resolve(value)
          else reject(pending.givenUp)
        },
        reject: (error) => {
          clear()
          reject(pending.givenUp ?? error)
        },
        giveUp: (error) => {
          if (pending.givenUp !== undefined) return
          pending.givenUp = error
          this.#post({ op: 'cancel', call })
          // While the worker writes, its answer is awaited: the caller may free the blocks as soon as this call has settled.
          if (gate === undefined || gate.close()) pending.reject(error)
        }
      }
      const onAbort = (): void => pending.giveUp(aborted(what, signal))
      const timer = setTimeout(() => pending.giveUp(new P2PError('TIMEOUT', `${what} took longer than ${timeoutMs} ms`)), timeoutMs)
      signal?.addEventListener('abort', onAbort, { once: true })
      this.#pending.set(call, pending)
      this.#post(message(call))
    })
  }

  done (call: number, value: unknown): void {
    this.#pending.get(call)?.resolve(value)
  }

  failed (call: number, code: P2PErrorCode, message: string): void {
    this.#pending.get(call)?.reject(new P2PError(code, message))
  }

  giveUpAll (error: P2PError): void {
    for (const pending of [...this.#pending.values()]) pending.giveUp(error)
  }

  /** The worker has ended: it writes no block and answers no call any more. */
  rejectAll (error: P2PError): void {
    for (const pending of [...this.#pending.values()]) pending.reject(error)
  }
}

function aborted (what: string, signal: AbortSignal | undefined): P2PError {
  return new P2PError('ABORTED', `${what} was aborted`, { cause: signal?.reason })
}
