import type { Worker } from 'node:worker_threads'
import { bareWorker } from './bare-worker.ts'
import type { FromWorker, ToWorker, WorkerInit } from './messages.ts'
import { ProgramError } from './messages.ts'
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
  readonly name: string
  readonly #worker: Worker
  readonly #concurrency: number
  readonly #waiting = new Set<Job>()
  readonly #running = new Map<number, Job>()
  #lastId = 0
  #dead: Error | undefined
  #closing: Promise<void> | undefined
  readonly #exited: Promise<void>
  /** Totals over the life of the host, microseconds. */
  readonly totals = { calls: 0, busyUs: 0, ortUs: 0 }

  private constructor (worker: Worker, name: string, concurrency: number) {
    this.#worker = worker
    this.name = name
    this.#concurrency = concurrency
    this.#exited = new Promise(resolve => {
      worker.once('exit', code => {
        this.#fail(new Error(this.#closing === undefined ? `session worker "${name}" ended unexpectedly (exit code ${code})` : `session worker "${name}" is closed`))
        resolve()
      })
    })
    worker.on('error', err => this.#fail(new Error(`session worker "${name}" crashed: ${err.message}`, { cause: err })))
  }

  /**
   * Starts the worker and resolves when the program has built itself.
   * @throws what the program's `create` threw: a missing file, package or CUDA provider.
   */
  static async open<M extends ProgramMethods, D = unknown> (options: ProgramHostOptions<D>): Promise<ProgramHost<M>> {
    const name = options.name ?? options.program.pathname.split('/').pop() ?? 'program'
    const init: WorkerInit = {
      program: options.program.href, device: options.device, threads: options.threads, data: options.data, pools: options.pools ?? {}
    }
    const worker = bareWorker(new URL('./session-worker.js', import.meta.url), name, init)
    const host = new ProgramHost<M>(worker, name, options.concurrency ?? 1)
    await host.#started()
    return host
  }

  #started (): Promise<void> {
    return new Promise((resolve, reject) => {
      this.#worker.once('exit', () => reject(this.#dead))
      this.#worker.once('error', () => reject(this.#dead))
      this.#worker.on('message', (message: FromWorker) => {
        if (message.type === 'ready') resolve()
        else if (message.type === 'failed') reject(new ProgramError(message.error))
        else this.#settle(message)
      })
    })
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
      if (this.#closing !== undefined) return reject(new Error(`session worker "${this.name}" is closed`))
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
    for (const job of this.#waiting) {
      if (this.#running.size >= this.#concurrency) return
      this.#waiting.delete(job)
      this.#running.set(job.id, job)
      const message: ToWorker = { type: 'call', id: job.id, method: job.method, args: job.args }
      try {
        this.#worker.postMessage(message, job.transfer)
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

  #fail (reason: Error): void {
    this.#dead ??= reason
    const jobs = [...this.#running.values(), ...this.#waiting]
    this.#running.clear()
    this.#waiting.clear()
    for (const job of jobs) job.reject(this.#dead)
  }

  /** Rejects what waits, lets what runs end (up to 5 s), releases the sessions and ends the thread. Idempotent. */
  close (): Promise<void> {
    this.#closing ??= this.#close()
    return this.#closing
  }

  async #close (): Promise<void> {
    const reason = new Error(`session worker "${this.name}" is closed`)
    for (const job of [...this.#waiting]) {
      this.#waiting.delete(job)
      job.reject(reason)
    }
    this.#worker.postMessage({ type: 'close' } satisfies ToWorker)
    const timer = setTimeout(() => { this.#worker.terminate().catch(() => {}) }, CLOSE_TIMEOUT_MS)
    await this.#exited
    clearTimeout(timer)
  }

  async [Symbol.asyncDispose] (): Promise<void> {
    await this.close()
  }
}
