import type { Failure } from './exchange.ts'

/** One answered request. */
export interface RequestResult {
  /** Milliseconds after the start of the load at which it was due, or in a closed loop was sent; its times count from there. */
  readonly atMs: number
  /** Milliseconds that it left after it was due. */
  readonly lateMs: number
  readonly pictures: number
  /** How many of the pictures were sent before. */
  readonly repeated: number
  /** To the first token; null where none came. */
  readonly ttftMs: number | null
  /** Per output token after the first: (last - first) / (tokens - 1); null with fewer than two. */
  readonly tpotMs: number | null
  readonly endToEndMs: number
  readonly inputTokens: number | null
  readonly outputTokens: number
  readonly counted: 'usage' | 'chunks'
  readonly plan: string | null
  readonly error: Failure | null
}

export interface Spread { readonly mean: number, readonly p50: number, readonly p90: number, readonly p99: number, readonly max: number }

/** Of the requests that were answered well. Null where there is nothing to measure. */
export interface Figures {
  readonly requests: number
  readonly requestsPerSecond: number
  readonly ttftMs: Spread | null
  readonly tpotMs: Spread | null
  readonly endToEndMs: Spread | null
  readonly inputTokens: number
  readonly outputTokens: number
  readonly outputTokensPerSecond: number
  /** Requests that met the objective, and how many of them a second; null without an objective. */
  readonly withinSlo: number | null
  readonly goodput: number | null
}

export interface LoadReport extends Figures {
  readonly url: string
  /** When the load began, in ISO 8601. */
  readonly started: string
  /** From the start to the last answer. */
  readonly elapsedMs: number
  /** True when the load was given up before its end. */
  readonly interrupted: boolean
  readonly failed: number
  /** In flight when the load was given up. */
  readonly cancelled: number
  readonly load: Readonly<Record<string, unknown>> & { readonly model: string, readonly pictures: number, readonly width: number, readonly height: number, readonly rate: number | null, readonly concurrency: number | null }
  readonly slo: { readonly ttftMs: number | null, readonly tpotMs: number | null }
  /** How late requests left, all of them. In a closed loop: after another had ended. */
  readonly lateMs: Spread | null
  /** Where requests with pictures and such with text only were sent: the figures of each. */
  readonly byKind: { readonly pictures: Figures, readonly text: Figures } | null
  /** How often each `x-epd-plan` came. */
  readonly plans: Readonly<Record<string, number>>
  /** What counted the output tokens; `chunks` where the server gave no usage. */
  readonly counted: 'usage' | 'chunks' | 'both' | null
  readonly errors: ReadonlyArray<Failure & { readonly count: number }>
  readonly results: readonly RequestResult[]
}

type Measured = Pick<LoadReport, 'url' | 'started' | 'elapsedMs' | 'interrupted' | 'cancelled' | 'load' | 'slo' | 'results'>

export function reportOf (measured: Measured): LoadReport {
  const { results, slo, elapsedMs } = measured
  const good = results.filter(({ error }) => error === null)
  const withPictures = good.filter(({ pictures }) => pictures > 0)
  const textOnly = good.filter(({ pictures }) => pictures === 0)
  const figures = (some: readonly RequestResult[]): Figures => figuresOf(some, slo, elapsedMs / 1_000)
  const counters = new Set(good.map(({ counted }) => counted))
  return {
    ...measured,
    ...figures(good),
    failed: results.length - good.length,
    lateMs: spreadOf(results.map(({ lateMs }) => lateMs)),
    byKind: withPictures.length > 0 && textOnly.length > 0 ? { pictures: figures(withPictures), text: figures(textOnly) } : null,
    plans: countsOf(good.flatMap(({ plan }) => plan ?? [])),
    counted: counters.size > 1 ? 'both' : [...counters][0] ?? null,
    errors: errorsOf(results)
  }
}

function figuresOf (good: readonly RequestResult[], slo: LoadReport['slo'], seconds: number): Figures {
  const rate = (count: number): number => seconds > 0 ? count / seconds : 0
  const outputTokens = sum(good.map(result => result.outputTokens))
  const hasSlo = slo.ttftMs !== null || slo.tpotMs !== null
  // An answer without a token meets no limit of its first; one of a single token has none after it that could be late.
  const met = good.filter(({ ttftMs, tpotMs }) => (ttftMs ?? Infinity) <= (slo.ttftMs ?? Infinity) && (tpotMs ?? 0) <= (slo.tpotMs ?? Infinity)).length
  return {
    requests: good.length,
    requestsPerSecond: rate(good.length),
    ttftMs: spreadOf(good.flatMap(({ ttftMs }) => ttftMs ?? [])),
    tpotMs: spreadOf(good.flatMap(({ tpotMs }) => tpotMs ?? [])),
    endToEndMs: spreadOf(good.map(({ endToEndMs }) => endToEndMs)),
    inputTokens: sum(good.map(({ inputTokens }) => inputTokens ?? 0)),
    outputTokens,
    outputTokensPerSecond: rate(outputTokens),
    withinSlo: hasSlo ? met : null,
    goodput: hasSlo ? rate(met) : null
  }
}

/** The nearest rank: always a value that was measured. Null without values. */
export function spreadOf (values: readonly number[]): Spread | null {
  if (values.length === 0) return null
  const sorted = values.toSorted((a, b) => a - b)
  const at = (share: number): number => sorted[Math.max(0, Math.ceil(share * sorted.length) - 1)]!
  return { mean: sum(values) / values.length, p50: at(0.5), p90: at(0.9), p99: at(0.99), max: at(1) }
}

function errorsOf (results: readonly RequestResult[]): LoadReport['errors'] {
  const found = new Map<string, Failure & { count: number }>()
  for (const { error } of results) {
    if (error === null) continue
    const key = `${error.status} ${error.code}`
    const known = found.get(key)
    if (known === undefined) found.set(key, { ...error, count: 1 })
    else known.count++
  }
  return [...found.values()].sort((a, b) => b.count - a.count)
}

function countsOf (names: readonly string[]): Record<string, number> {
  const counts = new Map<string, number>()
  for (const name of names) counts.set(name, (counts.get(name) ?? 0) + 1)
  return Object.fromEntries(counts)
}

function sum (values: readonly number[]): number {
  return values.reduce((total, value) => total + value, 0)
}
