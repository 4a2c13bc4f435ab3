import { setMaxListeners } from 'node:events'
import { setImmediate, setTimeout as delay } from 'node:timers/promises'
import { Agent, request } from 'undici'
import { readWhole } from '../../../adapters/http/failures.ts'
import { exchange } from './exchange.ts'
import { seeded } from './random.ts'
import { reportOf, type LoadReport, type RequestResult } from './report.ts'
import { stockOf, type Stock } from './stock.ts'
import type { PreparedRequest } from './workload.ts'

export interface LoadOptions {
  /** Base URL of an OpenAI-compatible server, with or without `/v1` at its end. */
  readonly url: string
  /** @default the first of `/v1/models` */
  readonly model?: string | undefined
  /** Requests to send. @default 100, where no duration is given */
  readonly requests?: number | undefined
  /** Milliseconds in which requests are sent; those in flight are waited for. */
  readonly durationMs?: number | undefined
  /** Requests in flight: so many at any time, or with a rate at most. @default 8; no limit with a rate */
  readonly concurrency?: number | undefined
  /** Requests per second, at random times (Poisson), whether earlier ones are answered or not. */
  readonly rate?: number | undefined
  /** Requests before those that count, with pictures and texts of their own. @default 0 */
  readonly warmup?: number | undefined
  /** Pictures of a request. @default 1 */
  readonly pictures?: number | undefined
  /** Pixels. @default 448 */
  readonly width?: number | undefined
  readonly height?: number | undefined
  /** @default 'png' */
  readonly format?: 'png' | 'jpeg' | undefined
  /** Share, 0 to 1, of the pictures that were sent before. @default 0 */
  readonly repeat?: number | undefined
  /** Share, 0 to 1, of the requests that have text only. @default 0 */
  readonly textShare?: number | undefined
  /** Words of a prompt, about as many tokens. @default 32 */
  readonly promptTokens?: number | undefined
  /** @default 64 */
  readonly maxTokens?: number | undefined
  /** Asks for answers of `maxTokens`, where the server knows `ignore_eos`. @default false */
  readonly ignoreEos?: boolean | undefined
  /** Asks for `usage` in the stream. @default true */
  readonly usage?: boolean | undefined
  /** Further members of each body. */
  readonly body?: Readonly<Record<string, unknown>> | undefined
  readonly headers?: Readonly<Record<string, string>> | undefined
  /** The same seed gives the same requests at the same planned times. @default 1 */
  readonly seed?: number | undefined
  /** Milliseconds for one request. @default 300000 */
  readonly timeoutMs?: number | undefined
  readonly sloTtftMs?: number | undefined
  readonly sloTpotMs?: number | undefined
  /** Ends the load; the report has what was answered until then. */
  readonly signal?: AbortSignal | undefined
  readonly onProgress?: ((progress: LoadProgress) => void) | undefined
}

export interface LoadProgress {
  readonly phase: 'prepare' | 'warm-up' | 'load'
  readonly elapsedMs: number
  readonly inFlight: number
  readonly done: number
  readonly failed: number
}

const DEFAULT_REQUESTS = 100
const DEFAULT_CONCURRENCY = 8
const MODELS_TIMEOUT_MS = 10_000
const MODELS_BYTES = 4 * 1024 * 1024

/**
 * Sends a load of pictures and texts to a server and measures the answers.
 *
 * In a closed loop (the default) a request follows when another has ended. In an open loop (`rate`) requests are due at
 * times of their own and are measured from those, so that a slow server can't slow the load that it is measured with.
 * Pictures are made before their request is due; how late requests left is in the report.
 *
 * @throws Error when the server has no model, or pictures can't be made; a failing request is counted in the report
 */
export async function runLoad (options: LoadOptions): Promise<LoadReport> {
  const { seed = 1, timeoutMs = 300_000, headers = {}, signal = new AbortController().signal } = options
  // Each request in flight listens to it.
  setMaxListeners(0, signal)
  const base = options.url.replace(/\/+$/, '').replace(/\/v1$/, '')
  // No timers of the client's own: `timeoutMs` is the only limit.
  const dispatcher = new Agent({ headersTimeout: 0, bodyTimeout: 0, pipelining: 1 })
  try {
    const model = options.model ?? await firstModel(base, { headers, dispatcher, signal })
    const workload = {
      model,
      seed,
      pictures: options.pictures ?? 1,
      width: options.width ?? 448,
      height: options.height ?? options.width ?? 448,
      format: options.format ?? 'png',
      repeat: options.repeat ?? 0,
      textShare: options.textShare ?? 0,
      promptTokens: options.promptTokens ?? 32,
      maxTokens: options.maxTokens ?? 64,
      ignoreEos: options.ignoreEos ?? false,
      usage: options.usage ?? true,
      body: options.body ?? {}
    }
    const requests = options.requests ?? (options.durationMs === undefined ? DEFAULT_REQUESTS : Infinity)
    const limits = { requests, durationMs: options.durationMs ?? Infinity, rate: options.rate, concurrency: options.concurrency ?? (options.rate === undefined ? DEFAULT_CONCURRENCY : Infinity) }
    const send = { url: `${base}/v1/chat/completions`, headers, dispatcher, timeoutMs, signal }
    const warmup = options.warmup ?? 0
    const onProgress = options.onProgress ?? (() => {})
    if (warmup > 0) {
      const concurrency = Math.min(limits.concurrency, DEFAULT_CONCURRENCY)
      await new Run(await stockOf({ ...workload, seed: ~seed }, warmup), { requests: warmup, durationMs: Infinity, rate: undefined, concurrency }, send, seed, progress => { onProgress({ phase: 'warm-up', ...progress }) }).toEnd()
    }
    onProgress({ phase: 'prepare', elapsedMs: 0, inFlight: 0, done: 0, failed: 0 })
    const run = new Run(await stockOf(workload, requests), limits, send, seed, progress => { onProgress({ phase: 'load', ...progress }) })
    const started = new Date().toISOString()
    const elapsedMs = await run.toEnd()
    return reportOf({
      url: base,
      started,
      elapsedMs,
      interrupted: signal.aborted,
      cancelled: run.cancelled,
      load: { ...workload, requests: finite(requests), durationMs: finite(limits.durationMs), rate: limits.rate ?? null, concurrency: finite(limits.concurrency), warmup },
      slo: { ttftMs: options.sloTtftMs ?? null, tpotMs: options.sloTpotMs ?? null },
      results: run.results
    })
  } finally {
    await dispatcher.destroy()
  }
}

interface Limits {
  readonly requests: number
  readonly durationMs: number
  readonly rate: number | undefined
  readonly concurrency: number
}

/** One pass over a workload. */
class Run {
  readonly results: RequestResult[] = []
  /** In flight when the load was given up. */
  cancelled = 0
  readonly #stock: Stock
  readonly #limits: Limits
  readonly #send: Parameters<typeof exchange>[1]
  readonly #seed: number
  readonly #onProgress: (progress: Omit<LoadProgress, 'phase'>) => void
  readonly #start = performance.now()
  #sent = 0
  #inFlight = 0
  #failed = 0

  constructor (stock: Stock, limits: Limits, send: Parameters<typeof exchange>[1], seed: number, onProgress: (progress: Omit<LoadProgress, 'phase'>) => void) {
    this.#stock = stock
    this.#limits = limits
    this.#send = send
    this.#seed = seed
    this.#onProgress = onProgress
  }

  /** Resolves with the milliseconds from the start to the last answer. */
  async toEnd (): Promise<number> {
    await (this.#limits.rate === undefined ? this.#closedLoop() : this.#openLoop(this.#limits.rate))
    return performance.now() - this.#start
  }

  #mayStart (at = performance.now()): boolean {
    return !this.#send.signal.aborted && this.#sent < this.#limits.requests && at - this.#start < this.#limits.durationMs
  }

  async #closedLoop (): Promise<void> {
    const worker = async (): Promise<void> => {
      while (this.#mayStart()) {
        const due = performance.now()
        this.#sent++
        await this.#one(await this.#stock.take(), due, undefined)
      }
    }
    await Promise.all(Array.from({ length: Math.min(this.#limits.concurrency, this.#limits.requests) }, worker))
  }

  async #openLoop (rate: number): Promise<void> {
    const random = seeded(this.#seed, 2)
    const { signal } = this.#send
    const flying = new Set<Promise<void>>()
    let due = this.#start
    for (;;) {
      due += -Math.log(1 - random()) * 1_000 / rate
      if (!this.#mayStart(due)) break
      const wait = due - performance.now()
      // Also a load that is late lets answers in between: they would seem to take longer.
      await (wait > 0 ? delay(wait, undefined, { signal }) : setImmediate(undefined, { signal })).catch(() => {})
      const prepared = await this.#stock.take()
      while (this.#inFlight >= this.#limits.concurrency && !signal.aborted) await Promise.race(flying)
      if (signal.aborted) break
      this.#sent++
      const one = this.#one(prepared, due, due).finally(() => { flying.delete(one) })
      flying.add(one)
    }
    await Promise.all(flying)
  }

  /** @param from when a request counts from, where that is not when it is sent */
  async #one ({ body, pictures, repeated }: PreparedRequest, due: number, from: number | undefined): Promise<void> {
    if (this.#send.signal.aborted) return
    this.#inFlight++
    const sentAt = performance.now()
    const start = from ?? sentAt
    const answer = await exchange(body, this.#send)
    this.#inFlight--
    if (answer === undefined) this.cancelled++
    else {
      const { failure, firstAt, lastAt, endedAt, inputTokens, outputTokens, counted, plan } = answer
      if (failure !== undefined) this.#failed++
      this.results.push({
        atMs: start - this.#start,
        lateMs: sentAt - due,
        pictures,
        repeated,
        ttftMs: firstAt === undefined ? null : firstAt - start,
        tpotMs: firstAt === undefined || lastAt === undefined || outputTokens < 2 ? null : (lastAt - firstAt) / (outputTokens - 1),
        endToEndMs: endedAt - start,
        inputTokens: inputTokens ?? null,
        outputTokens,
        counted,
        plan: plan ?? null,
        error: failure ?? null
      })
    }
    this.#onProgress({ elapsedMs: performance.now() - this.#start, inFlight: this.#inFlight, done: this.results.length, failed: this.#failed })
  }
}

async function firstModel (base: string, { headers, dispatcher, signal }: Pick<Parameters<typeof exchange>[1], 'headers' | 'dispatcher' | 'signal'>): Promise<string> {
  const { status, text } = await request(`${base}/v1/models`, { headers, dispatcher, signal: AbortSignal.any([signal, AbortSignal.timeout(MODELS_TIMEOUT_MS)]) }).then(
    async ({ statusCode, body }) => ({ status: statusCode, text: (await readWhole(body, MODELS_BYTES))?.toString() ?? '' })
  ).catch((err: NodeJS.ErrnoException) => {
    if (signal.aborted) throw new Error('given up before the first request')
    const why = err.name === 'TimeoutError' ? `no answer within ${MODELS_TIMEOUT_MS / 1_000} s` : err.code ?? err.message
    throw new Error(`can't reach ${base} (${why})`, { cause: err })
  })
  if (status !== 200) throw new Error(`${base}/v1/models answered ${status}: ${text.slice(0, 300)}`)
  const id: unknown = (() => { try { return (JSON.parse(text) as { data?: Array<{ id?: unknown }> })?.data?.[0]?.id } catch { return undefined } })()
  if (typeof id !== 'string') throw new Error(`${base}/v1/models names no model; name one with --model`)
  return id
}

function finite (value: number): number | null {
  return Number.isFinite(value) ? value : null
}
