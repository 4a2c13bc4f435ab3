import type { Worker } from 'node:worker_threads'
import { Backoff } from '../../adapters/wire/backoff.ts'
import type { EngineLog } from '../service/engine-service.ts'

const FIRST_PAUSE_MS = 100
const LONGEST_PAUSE_MS = 10_000
/** A thread that ends after this long has recovered from its last end. */
const STEADY_MS = 30_000

export interface ThreadOptions<M> {
  /** For logs and errors: `session worker "llm"`. */
  readonly name: string
  readonly make: () => Worker
  /** By each message until one says it: the thread works, or why it can't; undefined: it says neither. The message goes on to `onMessage`. */
  readonly started: (message: M) => 'works' | Error | undefined
  readonly onMessage: (message: M) => void
  /** The thread has ended by itself, and with it what it was working on; `again` is false when an attempt to start it anew has failed. */
  readonly onLost: (reason: Error, again: boolean) => void
  /** The thread works again. */
  readonly onBack: () => void
  readonly log?: Pick<EngineLog, 'warn' | 'error'> | undefined
}

/**
 * A worker thread that is started anew when it ends by itself, at once and then with growing pauses. While it is gone
 * `problem` says so, which makes /health answer 503.
 */
export class Thread<M> {
  readonly #options: ThreadOptions<M>
  readonly #backoff = new Backoff(FIRST_PAUSE_MS, LONGEST_PAUSE_MS)
  /** Starting or working. */
  #worker: Worker | undefined
  #works = false
  #problem: string | undefined
  /** Set when it is to end. */
  #onClosed: (() => void) | undefined
  #timer: NodeJS.Timeout | undefined

  private constructor (options: ThreadOptions<M>) {
    this.#options = options
  }

  /** Resolves when the thread works. @throws what it says is in its way, or how it ended */
  static async open<M> (options: ThreadOptions<M>): Promise<Thread<M>> {
    const thread = new Thread(options)
    await thread.#start()
    return thread
  }

  /** Why it does not work just now. */
  get problem (): string | undefined {
    return this.#problem
  }

  /** False: the thread is gone, and the message with it. */
  post (message: unknown, transfer: readonly ArrayBuffer[] = []): boolean {
    if (!this.#works) return false
    this.#worker?.postMessage(message, transfer)
    return true
  }

  /** Posts the message that ends the thread, waits, and ends it by force after `timeoutMs`. It does not start anew. */
  async close (message: unknown, timeoutMs: number): Promise<void> {
    clearTimeout(this.#timer)
    const worker = this.#worker
    const ended = new Promise<void>(resolve => { this.#onClosed = resolve })
    if (worker === undefined) return
    worker.postMessage(message)
    const timer = setTimeout(() => { worker.terminate().catch(() => {}) }, timeoutMs)
    await ended
    clearTimeout(timer)
  }

  #start (): Promise<void> {
    const { name, make, started, onMessage } = this.#options
    const worker = this.#worker = make()
    const since = performance.now()
    let crash: Error | undefined
    return new Promise((resolve, reject) => {
      worker.on('message', (message: M) => {
        if (this.#works || crash !== undefined) return
        const said = started(message)
        if (said instanceof Error) crash = said
        if (said !== 'works') return
        this.#works = true
        this.#problem = undefined
        resolve()
      })
      worker.on('message', onMessage)
      worker.on('error', (err: Error) => { crash ??= new Error(`${name} crashed: ${err.message}`, { cause: err }) })
      worker.once('exit', code => {
        const reason = crash ?? new Error(`${name} ended unexpectedly (exit code ${code})`)
        const worked = this.#works
        this.#worker = undefined
        this.#works = false
        if (this.#onClosed !== undefined) this.#onClosed()
        else if (worked) this.#lost(reason, performance.now() - since)
        reject(reason)
      })
    })
  }

  #lost (reason: Error, livedMs: number): void {
    const { name, log, onLost } = this.#options
    if (livedMs > STEADY_MS) this.#backoff.reset()
    this.#problem = `The ${name} has ended and is being started anew.`
    log?.error({ err: reason, thread: name }, 'a worker thread has ended; starting it anew')
    onLost(reason, true)
    this.#restartLater()
  }

  #restartLater (): void {
    this.#timer = setTimeout(() => {
      this.#start().then(() => {
        this.#options.log?.warn({ thread: this.#options.name }, 'the worker thread works again')
        this.#options.onBack()
      }, (reason: Error) => {
        if (this.#onClosed !== undefined) return
        this.#options.log?.error({ err: reason, thread: this.#options.name }, 'the worker thread could not be started anew')
        this.#options.onLost(reason, false)
        this.#restartLater()
      })
    }, this.#backoff.pause())
  }
}
