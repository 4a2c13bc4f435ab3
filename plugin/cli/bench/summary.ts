import { clean, duration, table } from '../terminal.ts'
import type { LoadReport, Spread } from './report.ts'

/** Beyond it the load, not the server, may be what was measured. */
const LATE_MS = 50
const SHOWN_ERRORS = 20
const TIMES: ReadonlyArray<readonly [name: string, key: 'ttftMs' | 'tpotMs' | 'endToEndMs']> = [['TTFT', 'ttftMs'], ['TPOT', 'tpotMs'], ['end to end', 'endToEndMs']]

/** A report for people. */
export function renderReport (report: LoadReport): string {
  const { load, byKind, errors } = report
  const times = [
    ...TIMES.flatMap(([name, key]) => [
      ...rowOf(name, report[key]),
      ...(byKind === null ? [] : [...rowOf('  with pictures', byKind.pictures[key]), ...rowOf('  text only', byKind.text[key])])
    ]),
    ...rowOf('sent late', report.lateMs)
  ]
  const parts = [`${clean(report.url)}  ${clean(load.model)}\n${shapeOf(load)}\n`, table(totals(report))]
  if (times.length > 0) parts.push(table([['', 'p50', 'p90', 'p99', 'max'], ...times]))
  if (errors.length > 0) parts.push('errors\n' + table(errors.slice(0, SHOWN_ERRORS).map(({ status, code, count, message }) => [`  ${status ?? 'no answer'}`, code, String(count), message])) + (errors.length > SHOWN_ERRORS ? `  and ${errors.length - SHOWN_ERRORS} kinds more (--json has them)\n` : ''))
  const late = report.lateMs !== null && report.lateMs.p90 > LATE_MS
  if (late) parts.push(`Requests left ${duration(report.lateMs!.p90)} late (p90): ${whyLate(report)}\n`)
  return parts.join('\n')
}

function totals (report: LoadReport): string[][] {
  const { requests, failed, cancelled, elapsedMs, slo, withinSlo, goodput } = report
  const limits = [...(slo.ttftMs === null ? [] : [`TTFT within ${duration(slo.ttftMs)}`]), ...(slo.tpotMs === null ? [] : [`TPOT within ${duration(slo.tpotMs)}`])]
  const plans = Object.entries(report.plans).map(([plan, count]) => `${plan} ${count}`).join(', ')
  return [
    ['requests', `${requests} ok, ${failed} failed${cancelled > 0 ? `, ${cancelled} cancelled` : ''} in ${(elapsedMs / 1_000).toFixed(1)} s${report.interrupted ? ' (interrupted)' : ''}`],
    ['throughput', `${report.requestsPerSecond.toFixed(2)} requests/s, ${report.outputTokensPerSecond.toFixed(1)} output tokens/s`],
    ['tokens', `${report.inputTokens || '-'} in, ${report.outputTokens} out${report.counted === 'chunks' ? ' (chunks: the server gave no usage)' : report.counted === 'both' ? ' (some by usage, some by chunks)' : ''}`],
    ...(goodput === null ? [] : [['goodput', `${goodput.toFixed(2)} requests/s with ${limits.join(' and ')} (${withinSlo} of ${requests + failed})`]]),
    ...(plans === '' ? [] : [['plans', plans]])
  ]
}

function rowOf (name: string, spread: Spread | null): string[][] {
  return spread === null ? [] : [[name, ...[spread.p50, spread.p90, spread.p99, spread.max].map(duration)]]
}

function shapeOf ({ rate, concurrency, pictures, width, height }: LoadReport['load']): string {
  const loop = rate === null ? `closed loop, ${concurrency} in flight` : `open loop, ${rate} requests/s${concurrency === null ? '' : `, at most ${concurrency} in flight`}`
  return `${loop}; ${pictures === 0 ? 'text only' : `${pictures} picture${pictures === 1 ? '' : 's'} of ${width}x${height}`}`
}

function whyLate ({ load }: LoadReport): string {
  if (load.rate === null) return 'making the pictures held up the load. Smaller or fewer pictures help.'
  const cap = load.concurrency === null ? '' : ' or --concurrency was reached'
  return `this machine could not keep the schedule${cap}. Times count from the schedule.`
}
