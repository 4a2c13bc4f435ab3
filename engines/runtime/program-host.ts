import { EngineError } from '../service/errors.ts'
import { bareWorker } from './bare-worker.ts'
import type { FromWorker, ToWorker, WorkerInit } from './messages.ts'
import { ProgramError } from './messages.ts'
import { Thread } from './thread.ts'
import type { CallOptions, CallResult, MethodArgs, MethodValue, ProgramHostOptions, ProgramMethods } from './types.ts'

/** How long `close` waits for a running call before it ends the thread. */
const CLOSE_TIMEOUT_MS = 5_000

interface Job {
  readonly id: number
  readonly method: string
  readonly args: unknown
  readonly transfer: readonly ArrayBuffer[]
  resolve (result: CallResult<unknown>): void
  reject (reason: unknown): void
}

/**
 * Runs a program module in a worker thread of its own. Calls are handed over in order, one at a time (or as many as
 * `concurrency` says); the others wait here, where a signal can still drop them.
 */
export class ProgramHost<M extends ProgramMethods> {
  readonly #name: string
  #thread!: Thread<FromWorker>
  readonly #concurrency: number
  readonly #waiting = new Set<Job>()
  readonly #running = new Map<number, Job>()
  #lastId = 0
  /** Set while a worker that has ended could not be started anew. */
  #dead: Error | undefined
  #closing: Promise<void> | undefined
  /** Totals over the life of the host, microseconds. */
  readonly totals = { calls: 0, busyUs: 0, ortUs: 0 }

  private constructor (options: ProgramHostOptions<unknown>) {
    this.#name = `session worker "${options.name ?? options.program.pathname.split('/').pop() ?? 'program'}"`
    this.#concurrency = options.concurrency ?? 1
  }

  /**
   * Starts the worker and resolves when the program has built itself. A worker that ends later is started anew: what was
   * running in it fails, what waits goes to the new one.
   * @throws what the program's `create` threw: a missing file, package or CUDA provider.
   */
  static async open<M extends ProgramMethods, D = unknown> (options: ProgramHostOptions<D>): Promise<ProgramHost<M>> {
    const host = new ProgramHost<M>(options)
    const { program, device, threads, data, pools = {}, log } = options
    const init: WorkerInit = { program: program.href, device, threads, data, pools }
    host.#thread = await Thread.open<FromWorker>({
      name: host.#name,
      make: () => bareWorker(new URL('./session-worker.js', import.meta.url), options.name ?? 'program', init),
      started: message => message.type === 'ready' ? 'works' : message.type === 'failed' ? new ProgramError(message.error) : undefined,
      onMessage: message => { if ('id' in message) host.#settle(message) },
      onLost: (reason, again) => host.#lost(reason, again),
      onBack: () => host.#pump(),
      log
    })
    return host
  }

  /** Why calls can't be served just now: the worker has ended, and is being started anew. */
  get problem (): string | undefined {
    return this.#thread?.problem
  }

  /** Calls in the worker or waiting for it. */
  get pending (): number {
    return this.#waiting.size + this.#running.size
  }

  /**
   * Calls a method of the program.
   * @throws what the method threw (name and message kept), the signal's reason while waiting, or why the worker is gone.
   */
  call<K extends keyof M & string> (method: K, args: MethodArgs<M[K]>, options: CallOptions = {}): Promise<CallResult<MethodValue<M[K]>>> {
    const { signal, transfer = [] } = options
    return new Promise<CallResult<unknown>>((resolve, reject) => {
      if (this.#dead !== undefined) return reject(this.#dead)
      if (this.#closing !== undefined) return reject(new Error(`${this.#name} is closed`))
      if (signal?.aborted === true) return reject(signal.reason)
      const job: Job = { id: ++this.#lastId, method, args, transfer, resolve, reject }
      if (signal !== undefined) this.#dropOnAbort(job, signal)
      this.#waiting.add(job)
      this.#pump()
    }) as Promise<CallResult<MethodValue<M[K]>>>
  }

  #dropOnAbort (job: Job, signal: AbortSignal): void {
    const { resolve, reject } = job
    const onAbort = (): void => {
      if (this.#waiting.delete(job)) reject(signal.reason)
    }
    signal.addEventListener('abort', onAbort, { once: true })
    job.resolve = result => { signal.removeEventListener('abort', onAbort); resolve(result) }
    job.reject = reason => { signal.removeEventListener('abort', onAbort); reject(reason) }
  }

  #pump (): void {
    if (this.#thread.problem !== undefined) return
    this.#dead = undefined
    for (const job of this.#waiting) {
      if (this.#running.size >= this.#concurrency) return
      this.#waiting.delete(job)
      this.#running.set(job.id, job)
      const message: ToWorker = { type: 'call', id: job.id, method: job.method, args: job.args }
      try {
        this.#thread.post(message, job.transfer)
      } catch (err) {
        this.#running.delete(job.id)
        job.reject(err)
      }
    }
  }

  #settle (message: Extract<FromWorker, { id: number }>): void {
    const job = this.#running.get(message.id)
    if (job === undefined) return
    this.#running.delete(message.id)
    if (message.type === 'error') {
      job.reject(new ProgramError(message.error))
    } else {
      const { value, busyUs, ortUs } = message
      this.totals.calls++
      this.totals.busyUs += busyUs
      this.totals.ortUs += ortUs
      job.resolve({ value, busyUs, ortUs })
    }
    this.#pump()
  }

  /** What was running may be what ended the worker, so it is not given to the next one. */
  #lost (reason: Error, again: boolean): void {
    const running = [...this.#running.values()]
    this.#running.clear()
    for (const job of running) job.reject(reason)
    if (again) return
    this.#dead = new EngineError('initialising', `The ${this.#name} could not be started anew.`, { cause: reason })
    this.#dropWaiting(this.#dead)
  }

  #dropWaiting (reason: Error): void {
    const waiting = [...this.#waiting]
    this.#waiting.clear()
    for (const job of waiting) job.reject(reason)
  }

  /** Rejects what waits, lets what runs end (up to 5 s), releases the sessions and ends the thread. Idempotent. */
  close (): Promise<void> {
    this.#closing ??= this.#close()
    return this.#closing
  }

  async #close (): Promise<void> {
    const reason = new Error(`${this.#name} is closed`)
    this.#dropWaiting(reason)
    await this.#thread.close({ type: 'close' } satisfies ToWorker, CLOSE_TIMEOUT_MS)
    for (const job of this.#running.values()) job.reject(reason)
    this.#running.clear()
  }

  async [Symbol.asyncDispose] (): Promise<void> {
    await this.close()
  }
}
