import { setTimeout as delay } from 'node:timers/promises'
import type { TraceSummary } from '../traces/summary.ts'
import type { TraceView } from '../traces/view.ts'
import { follow } from './follow.ts'
import { terminal } from './terminal.ts'
import { noTraces, read, type TraceSource } from './trace-source.ts'
import { httpUrl, parseFlags, UsageError, withUsage } from './usage.ts'
import { renderWaterfall } from './waterfall.ts'

const HELP = `fastify-epd trace: one request's stages as a waterfall

Usage: fastify-epd trace [TRACE_ID] [options]
       fastify-epd trace --follow [options]

Without TRACE_ID it shows the last request. The id of a request is in its response header x-epd-trace-id.

Options:
  --url URL          gateway (default: http://127.0.0.1:8000)
  --admin-key KEY    sent as bearer token, when the gateway asks for one (or environment EPD_ADMIN_KEY)
  --follow           show each request from now on, until Ctrl-C
  --model, --plan, --status ok|error|aborted, --min-duration MS
                     which requests: the last of them, or all with --follow
  --json             print traces as JSON (with --follow, one a line)
  -h, --help         this text
`

const FLAGS = {
  url: { type: 'string', default: 'http://127.0.0.1:8000' },
  'admin-key': { type: 'string' },
  json: { type: 'boolean', default: false },
  follow: { type: 'boolean', default: false },
  model: { type: 'string' },
  plan: { type: 'string' },
  status: { type: 'string' },
  'min-duration': { type: 'string' },
  help: { type: 'boolean', short: 'h', default: false }
} as const

const STATUSES = ['ok', 'error', 'refused', 'aborted']
/** Engines send their spans 200 ms after they end: a trace that has not grown for longer is complete. */
const SETTLED_AFTER_MS = 450
const POLL_MS = 50

/** `fastify-epd trace`. 1: no such trace, or the gateway can't be asked. */
export function traceCommand (argv: string[]): Promise<number> {
  return withUsage('trace', async () => {
    const { values, positionals } = parseFlags({ args: argv, options: FLAGS, allowPositionals: true })
    if (values.help) {
      process.stdout.write(HELP)
      return 0
    }
    if (positionals.length > 1) throw new UsageError('give one trace id at most')
    const id = positionals[0]
    if (id !== undefined && !/^[0-9a-f]{32}$/i.test(id)) throw new UsageError(`a trace id has 32 hexadecimal digits, not '${id}'`)
    const source = { url: httpUrl('--url', values.url), adminKey: values['admin-key'] ?? process.env.EPD_ADMIN_KEY }
    const filter = filterOf(values)
    if (values.follow) {
      if (id !== undefined) throw new UsageError('--follow takes no trace id')
      return await followUntilSignal(source, filter, values.json)
    }
    const filtered = filter.size > 0
    const wanted = id ?? await lastTraceId(source, filter)
    const trace = wanted === undefined ? undefined : await fetchTrace(source, wanted)
    if (trace === undefined) {
      process.stderr.write(`fastify-epd trace: ${id === undefined ? filtered ? 'the gateway has no such traces' : 'the gateway has no traces yet' : `the gateway has no trace ${id}`}\n`)
      return 1
    }
    process.stdout.write(values.json ? JSON.stringify(trace, null, 2) + '\n' : renderWaterfall(trace, terminal()))
    return 0
  })
}

/**
 * A trace from a running gateway, once it is complete: engines send their spans a moment after the answer, so it is
 * asked for until it stops growing.
 *
 * @param maxMs how long to wait for that, at most
 * @returns undefined when the gateway has no such trace
 */
export async function fetchTrace (source: TraceSource, traceId: string, maxMs = 3_000): Promise<TraceView | undefined> {
  const end = performance.now() + maxMs
  let trace = await read<TraceView>(source, `/epd/traces/${traceId}`)
  let grown = performance.now()
  while (performance.now() < Math.min(end, grown + SETTLED_AFTER_MS)) {
    // A trace that ended a while ago has all it will ever have.
    if (trace !== undefined && Date.now() - Date.parse(trace.start) - trace.durationMs > 2 * SETTLED_AFTER_MS) break
    await delay(POLL_MS)
    const next = await read<TraceView>(source, `/epd/traces/${traceId}`)
    if ((next?.spans.length ?? 0) > (trace?.spans.length ?? 0)) grown = performance.now()
    trace = next ?? trace
  }
  return trace
}

function filterOf (values: { model?: string | undefined, plan?: string | undefined, status?: string | undefined, 'min-duration'?: string | undefined }): URLSearchParams {
  const { model, plan, status, 'min-duration': least } = values
  if (status !== undefined && !STATUSES.includes(status)) throw new UsageError(`--status must be one of ${STATUSES.join(', ')}, not '${status}'`)
  if (least !== undefined && !/^\d+(\.\d+)?$/.test(least)) throw new UsageError(`--min-duration must be milliseconds, not '${least}'`)
  const filter = new URLSearchParams()
  for (const [name, value] of Object.entries({ model, plan, status, min_duration_ms: least })) if (value !== undefined) filter.set(name, value)
  return filter
}

async function followUntilSignal (source: TraceSource, filter: URLSearchParams, json: boolean): Promise<number> {
  if (await read(source, '/epd/traces?limit=1') === undefined) throw noTraces(source)
  const stop = new AbortController()
  const onSignal = (): void => { stop.abort() }
  process.once('SIGINT', onSignal).once('SIGTERM', onSignal)
  // The reader of the pipe has seen enough.
  process.stdout.once('error', onSignal)
  try {
    await follow({
      get: path => read(source, path),
      filter,
      show: trace => { process.stdout.write(json ? JSON.stringify(trace) + '\n' : renderWaterfall(trace, terminal()) + '\n') },
      onLost: err => { process.stderr.write(`fastify-epd trace: ${err.message}; waiting for it\n`) },
      onFound: () => { process.stderr.write('fastify-epd trace: the gateway is back\n') },
      signal: stop.signal,
      settledMs: SETTLED_AFTER_MS
    })
    return 0
  } finally {
    process.off('SIGINT', onSignal).off('SIGTERM', onSignal)
    process.stdout.off('error', onSignal)
  }
}

async function lastTraceId (source: TraceSource, filter: URLSearchParams): Promise<string | undefined> {
  filter.set('limit', '1')
  const answer = await read<{ traces: TraceSummary[] }>(source, `/epd/traces?${filter}`)
  if (answer === undefined) throw noTraces(source)
  return answer.traces[0]?.traceId
}
