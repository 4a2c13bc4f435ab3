/** What two readings of a gateway's metrics say of the time between them. */
import type { NodeRow } from '../node-status.ts'

/** A gateway at one moment. */
export interface Reading {
  /** On the clock of `performance.now()`. */
  readonly at: number
  readonly nodes: readonly NodeRow[]
  readonly samples: readonly Sample[]
}

export interface Sample { readonly name: string, readonly labels: Readonly<Record<string, string>>, readonly value: number }

export interface NodeRates {
  readonly callsPerSecond: number
  /** Of those, the ones that the node failed. */
  readonly failuresPerSecond: number
  /** Null without calls. */
  readonly meanMs: number | null
}

export interface Rates {
  readonly seconds: number
  /** Requests a second by outcome: ok, error, refused, aborted. */
  readonly requests: Readonly<Record<string, number>>
  readonly inFlight: number
  readonly waiting: number
  readonly retriesPerSecond: number
  readonly outputTokensPerSecond: number
  readonly ttftMs: Percentiles | null
  readonly tpotMs: Percentiles | null
  readonly nodes: Readonly<Record<string, NodeRates>>
}

export interface Percentiles { readonly p50: number, readonly p90: number }

const LINE = /^([a-zA-Z_:][\w:]*)(?:\{((?:[^"}]|"(?:[^"\\]|\\.)*")*)\})? +(\S+)/
/** No metric has a longer one. */
const MAX_LINE = 65_536
const LABEL = /(?<!\w)([a-zA-Z_]\w*)="((?:[^"\\]|\\.)*)"/g
/** Outcomes of a call in which the node is not to blame. */
const BLAMELESS = new Set(['ok', 'rejected', 'aborted'])

/** Prometheus' text. Lines that are none are left out. */
export function samplesOf (text: string): Sample[] {
  const samples: Sample[] = []
  // Line by line: braces that are not closed would be looked for in all lines that follow.
  for (const line of text.split('\n')) {
    const [, name, labels = '', number] = (line.length > MAX_LINE ? null : LINE.exec(line)) ?? []
    if (name === undefined) continue
    const value = Number(number!.replace(/^([+-]?)Inf$/, '$1Infinity'))
    if (!Number.isNaN(value)) samples.push({ name, labels: Object.fromEntries([...labels.matchAll(LABEL)].map(([, key, label]) => [key!, label!.replace(/\\(.)/g, (_all, char: string) => char === 'n' ? '\n' : char)])), value })
  }
  return samples
}

export function ratesBetween (earlier: Reading, later: Reading): Rates {
  const seconds = Math.max(0.001, (later.at - earlier.at) / 1_000)
  const before = new Map(earlier.samples.map(sample => [keyOf(sample), sample.value]))
  // A counter that has fallen belongs to a process that has started again.
  const gained = later.samples.map(sample => {
    const old = before.get(keyOf(sample)) ?? 0
    return { ...sample, value: sample.value < old ? sample.value : sample.value - old }
  })
  const named = (name: string): Sample[] => gained.filter(sample => sample.name === name)
  const level = (name: string): number => sum(later.samples.filter(sample => sample.name === name))
  const [calls, times] = [named('epd_stage_duration_seconds_count'), named('epd_stage_duration_seconds_sum')]
  return {
    seconds,
    requests: Object.fromEntries(['ok', 'error', 'refused', 'aborted'].map(outcome => [outcome, sum(named('epd_requests_total').filter(({ labels }) => labels.epd_outcome === outcome)) / seconds])),
    inFlight: level('epd_requests_in_flight'),
    waiting: level('epd_admission_waiting'),
    retriesPerSecond: sum(named('epd_retries_total')) / seconds,
    outputTokensPerSecond: sum(named('gen_ai_client_token_usage_sum').filter(({ labels }) => labels.gen_ai_token_type === 'output')) / seconds,
    ttftMs: percentiles(named('gen_ai_server_time_to_first_token_seconds_bucket')),
    tpotMs: percentiles(named('gen_ai_server_time_per_output_token_seconds_bucket')),
    nodes: Object.fromEntries(later.nodes.map(({ url }) => {
      const own = calls.filter(({ labels }) => labels.epd_node === url)
      const count = sum(own)
      return [url, {
        callsPerSecond: count / seconds,
        failuresPerSecond: sum(own.filter(({ labels }) => !BLAMELESS.has(labels.epd_outcome ?? ''))) / seconds,
        meanMs: count === 0 ? null : sum(times.filter(({ labels }) => labels.epd_node === url)) / count * 1_000
      }]
    }))
  }
}

/** From the buckets of a histogram, all its series together, in milliseconds. Null without observations. */
function percentiles (buckets: readonly Sample[]): Percentiles | null {
  const counts = new Map<number, number>()
  for (const { labels: { le }, value } of buckets) {
    const bound = le === '+Inf' ? Infinity : Number(le)
    counts.set(bound, (counts.get(bound) ?? 0) + value)
  }
  const bounds = [...counts].sort(([a], [b]) => a - b)
  const total = bounds.at(-1)?.[1] ?? 0
  if (total === 0) return null
  const at = (share: number): number => {
    const wanted = share * total
    const i = bounds.findIndex(([, count]) => count >= wanted)
    const [low, below] = i === 0 ? [0, 0] : bounds[i - 1]!
    const [high, upTo] = bounds[i]!
    // Beyond the last bound nothing is known but that it is more.
    if (high === Infinity) return low * 1_000
    return (low + (high - low) * (wanted - below) / (upTo - below)) * 1_000
  }
  return { p50: at(0.5), p90: at(0.9) }
}

function keyOf ({ name, labels }: Sample): string {
  return `${name}\n${Object.entries(labels).map(([key, value]) => `${key}=${value}`).join('\n')}`
}

function sum (samples: readonly Sample[]): number {
  return samples.reduce((total, { value }) => total + value, 0)
}
