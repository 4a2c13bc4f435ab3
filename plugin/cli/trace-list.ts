import type { TraceSummary } from '../traces/summary.ts'
import { clean, duration, table } from './terminal.ts'

/** Has the request, or a call that it made, failed? */
export function hasErrors ({ status, failures }: Pick<TraceSummary, 'status' | 'failures'>): boolean {
  return status === 'error' || status === 'refused' || failures.length > 0
}

/** A line for each request, the last one at the end; below it the calls that have failed. */
export function renderTraces (traces: readonly TraceSummary[]): string {
  const oldestFirst = traces.toReversed()
  const lines = table([
    ['TIME', 'TRACE', 'STATUS', 'MODEL', 'PLAN', 'DURATION', 'TTFT', 'PER TOKEN', 'IN', 'OUT'],
    ...oldestFirst.map(trace => [
      timeOf(trace.start), trace.traceId, trace.partial ? 'running' : [trace.status, trace.statusCode].filter(Boolean).join(' '), trace.model ?? '-', trace.plan ?? '-', duration(trace.durationMs),
      msOf(trace.firstTokenMs), msOf(trace.perTokenMs), String(trace.inputTokens ?? '-'), String(trace.outputTokens ?? '-')
    ])
  ]).split('\n')
  return [lines[0], ...oldestFirst.flatMap((trace, i) => [lines[i + 1], ...errorsOf(trace)])].join('\n') + '\n'
}

/** What failed, in its order, and what came of it. */
function errorsOf ({ error, failures, retries, status }: TraceSummary): string[] {
  const calls = failures.map(({ attempt, stage, node, code, message }) => `attempt ${attempt}, ${stage}${node === undefined ? '' : ` at ${node}`}: ${code}: ${message}`)
  const told = failures.at(-1)
  const end = error === undefined || (error.code === told?.code && error.message === told.message) ? retries > 0 && status === 'ok' ? [`answered after ${retries} ${retries === 1 ? 'retry' : 'retries'}`] : [] : [`${error.code}: ${error.message}`]
  return [...calls, ...end].map(line => `          ${clean(line)}`)
}

function timeOf (iso: string): string {
  const date = new Date(iso)
  return Number.isNaN(date.getTime()) ? '?' : date.toTimeString().slice(0, 8)
}

function msOf (ms: number | undefined): string {
  return ms === undefined ? '-' : duration(ms)
}
