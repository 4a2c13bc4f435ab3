/**
 * Metrics as text: that of Prometheus, and OpenMetrics with exemplars where a scraper asks for it.
 *
 * @see https://prometheus.io/docs/specs/om/open_metrics_spec/
 */
import type { Distribution, Exemplar, Labels, Sample } from './series.ts'

export interface Family {
  /** OpenTelemetry's, with dots. A unit and `_total` are put behind it. */
  readonly name: string
  /** `unknown`: a number that may go up and down under a counter's name. */
  readonly type: 'counter' | 'gauge' | 'histogram' | 'unknown'
  readonly help: string
  /** As in OpenTelemetry: `s`, `By`. */
  readonly unit?: string | undefined
  read (): ReadonlyArray<Sample | Distribution>
}

const UNITS: Readonly<Record<string, string>> = { s: 'seconds', By: 'bytes' }
const OPEN_METRICS = 'application/openmetrics-text'

export interface Exposition { readonly contentType: string, readonly text: string }

/** @param accept the scraper's header `accept` */
export function expose (families: readonly Family[], accept: string | undefined): Exposition {
  const open = wantsOpenMetrics(accept)
  const lines: string[] = []
  for (const family of families) writeFamily(family, open, lines)
  if (open) lines.push('# EOF')
  return {
    contentType: open ? `${OPEN_METRICS}; version=1.0.0; charset=utf-8` : 'text/plain; version=0.0.4; charset=utf-8',
    text: lines.join('\n') + '\n'
  }
}

/** Is OpenMetrics preferred to text? Not by whoever takes anything, such as curl. */
function wantsOpenMetrics (accept = ''): boolean {
  const weights = new Map(accept.toLowerCase().split(',').map(range => {
    const [type = '', ...parameters] = range.split(';').map(part => part.trim())
    const weight = Number(parameters.find(part => part.startsWith('q='))?.slice(2) ?? 1)
    return [type, weight] as const
  }))
  const open = weights.get(OPEN_METRICS) ?? 0
  return open > 0 && open >= (weights.get('text/plain') ?? 0)
}

/** A name of OpenTelemetry in Prometheus, without `_total`. */
export function prometheusName (name: string, unit: string | undefined): string {
  const flat = name.replaceAll('.', '_')
  const suffix = UNITS[unit ?? '']
  return suffix === undefined || flat.endsWith('_' + suffix) ? flat : `${flat}_${suffix}`
}

function writeFamily ({ name: plain, type, help, unit, read }: Family, open: boolean, lines: string[]): void {
  const name = prometheusName(plain, unit)
  const sampleName = type === 'counter' ? `${name}_total` : name
  const told = open ? name : sampleName
  lines.push(`# HELP ${told} ${escape(help, open)}`, `# TYPE ${told} ${type === 'unknown' && !open ? 'untyped' : type}`)
  if (open && UNITS[unit ?? ''] !== undefined) lines.push(`# UNIT ${told} ${UNITS[unit!]}`)
  for (const sample of read()) {
    if ('buckets' in sample) writeDistribution(name, sample, open, lines)
    else lines.push(`${sampleName}${labelsOf(sample.labels)} ${numberOf(sample.value)}`)
  }
}

/** Labels are written once for all buckets: 40 nodes have 5,000 lines, and relayed bytes wait meanwhile. */
function writeDistribution (name: string, { labels, bounds, buckets, sum, exemplars }: Distribution, open: boolean, lines: string[]): void {
  const pairs = pairsOf(labels)
  const head = `${name}_bucket{${pairs === '' ? '' : pairs + ','}le="`
  let count = 0
  for (let i = 0; i < buckets.length; i++) {
    count += buckets[i]!
    const le = i < bounds.length ? bounds[i]! : Infinity
    // OpenMetrics has one spelling for each bound.
    const text = open && Number.isInteger(le) ? le.toFixed(1) : numberOf(le)
    const exemplar = open ? exemplars[i] : undefined
    lines.push(`${head}${text}"} ${count}${exemplar === undefined ? '' : exemplarOf(exemplar)}`)
  }
  const all = pairs === '' ? '' : `{${pairs}}`
  lines.push(`${name}_sum${all} ${numberOf(sum)}`, `${name}_count${all} ${count}`)
}

/** A trace id is hexadecimal. */
function exemplarOf ({ traceId, value, at }: Exemplar): string {
  return ` # {trace_id="${traceId}"} ${numberOf(value)} ${at.toFixed(3)}`
}

function labelsOf (labels: Labels): string {
  const pairs = pairsOf(labels)
  return pairs === '' ? '' : `{${pairs}}`
}

function pairsOf (labels: Labels): string {
  let pairs = ''
  for (const name in labels) pairs += `${pairs === '' ? '' : ','}${name.replaceAll('.', '_')}="${escape(labels[name]!, true)}"`
  return pairs
}

function escape (text: string, quotes: boolean): string {
  if (!/[\\\n"]/.test(text)) return text
  const escaped = text.replaceAll('\\', '\\\\').replaceAll('\n', '\\n')
  return quotes ? escaped.replaceAll('"', '\\"') : escaped
}

function numberOf (value: number): string {
  return value === Infinity ? '+Inf' : value === -Infinity ? '-Inf' : String(value)
}
