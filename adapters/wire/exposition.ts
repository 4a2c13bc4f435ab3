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
    text: lines.map(line => line + '\n').join('')
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

function writeDistribution (name: string, { labels, bounds, buckets, sum, exemplars }: Distribution, open: boolean, lines: string[]): void {
  let count = 0
  for (const [i, inBucket] of buckets.entries()) {
    count += inBucket
    const le = i < bounds.length ? bounds[i]! : Infinity
    // OpenMetrics has one spelling for each bound.
    const text = open && Number.isInteger(le) ? le.toFixed(1) : numberOf(le)
    const exemplar = open ? exemplars[i] : undefined
    lines.push(`${name}_bucket${labelsOf({ ...labels, le: text })} ${count}${exemplar === undefined ? '' : exemplarOf(exemplar)}`)
  }
  const all = labelsOf(labels)
  lines.push(`${name}_sum${all} ${numberOf(sum)}`, `${name}_count${all} ${count}`)
}

function exemplarOf ({ traceId, value, at }: Exemplar): string {
  return ` # ${labelsOf({ trace_id: traceId })} ${numberOf(value)} ${at.toFixed(3)}`
}

function labelsOf (labels: Labels): string {
  const parts = Object.entries(labels).map(([name, value]) => `${name.replaceAll('.', '_')}="${escape(value, true)}"`)
  return parts.length === 0 ? '' : `{${parts.join(',')}}`
}

function escape (text: string, quotes: boolean): string {
  const escaped = text.replaceAll('\\', '\\\\').replaceAll('\n', '\\n')
  return quotes ? escaped.replaceAll('"', '\\"') : escaped
}

function numberOf (value: number): string {
  return value === Infinity ? '+Inf' : value === -Infinity ? '-Inf' : String(value)
}
