import { setTimeout as delay } from 'node:timers/promises'
import type { TraceSummary } from '../traces/summary.ts'
import type { TraceView } from '../traces/view.ts'
import { follow, type Wanted } from './follow.ts'
import { addressOf, GATEWAY_FLAGS, GATEWAY_HELP, type GatewayAddress } from './gateway-client.ts'
import { jsonText, terminal } from './terminal.ts'
import { renderComparison } from './trace-comparison.ts'
import { hasErrors, renderTraces } from './trace-list.ts'
import { noTraces, read } from './trace-source.ts'
import { parseFlags, UsageError, whole, withUsage } from './usage.ts'
import { renderWaterfall } from './waterfall.ts'

const HELP = `fastify-epd trace: one request's stages as a waterfall

Usage: fastify-epd trace [TRACE_ID] [options]
       fastify-epd trace --last N [options]           a line for each of the last requests
       fastify-epd trace --compare TRACE_ID TRACE_ID  two requests stage by stage
       fastify-epd trace --follow [options]           each request from now on, until Ctrl-C

Without TRACE_ID it shows the last request. The id of a request is in its response header x-epd-trace-id.

Options:
${GATEWAY_HELP}  --errors           requests that failed, were refused, or had a call that failed
  --model, --plan, --status ok|error|refused|aborted, --min-duration MS, --search WORDS
                     which requests; words are found in ids, names, keys, nodes and errors
  --json             print traces as JSON (with --follow, one a line)
  -h, --help         this text
`

const FLAGS = {
  ...GATEWAY_FLAGS,
  json: { type: 'boolean', default: false },
  follow: { type: 'boolean', default: false },
  last: { type: 'string' },
  errors: { type: 'boolean', default: false },
  compare: { type: 'boolean', default: false },
  search: { type: 'string' },
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
/** All that a gateway keeps. */
const MAX_LISTED = 1_000

/** `fastify-epd trace`. 1: no such trace, or the gateway can't be asked. */
export function traceCommand (argv: string[]): Promise<number> {
  return withUsage('trace', async () => {
    const flags = traceFlags(argv)
    if (flags === undefined) {
      process.stdout.write(HELP)
      return 0
    }
    const { source, ids: [id, other], filter, wanted, filtered, last, mode, json } = flags
    if (mode === 'follow') return await followUntilSignal(source, filter, wanted, json)
    if (mode === 'compare') return await compare(source, [id!, other!], json)
    if (id !== undefined) return await show(await existing(source, id), json)
    const found = await listOf(source, filter, wanted, last)
    if (found.length === 0) throw new Error(filtered ? 'the gateway has no such traces' : 'the gateway has no traces yet')
    if (mode === 'one') return await show(await existing(source, found[0]!.traceId), json)
    process.stdout.write(json ? jsonText(found, 2) : renderTraces(found))
    return 0
  })
}

interface TraceFlags {
  readonly mode: 'one' | 'last' | 'compare' | 'follow'
  readonly source: GatewayAddress
  readonly ids: readonly string[]
  readonly filter: URLSearchParams
  readonly wanted: Wanted
  readonly filtered: boolean
  /** How many traces are wanted. */
  readonly last: number
  readonly json: boolean
}

/** What is asked for; undefined for help. Throws UsageError. */
export function traceFlags (argv: string[]): TraceFlags | undefined {
  const { values, positionals: ids } = parseFlags({ args: argv, options: FLAGS, allowPositionals: true })
  if (values.help) return undefined
  const last = whole('--last', values.last, 1, MAX_LISTED)
  const modes = [...(last === undefined ? [] : ['last'] as const), ...(values.follow ? ['follow'] as const : []), ...(values.compare ? ['compare'] as const : [])]
  if (modes.length > 1) throw new UsageError('--last, --follow and --compare exclude each other')
  const [mode = 'one'] = modes
  if (mode === 'compare' && ids.length !== 2) throw new UsageError('give the two trace ids to compare')
  if (mode !== 'compare' && ids.length > (mode === 'one' ? 1 : 0)) throw new UsageError(mode === 'one' ? 'give one trace id at most' : `--${mode} takes no trace id`)
  const bad = ids.find(id => !/^[0-9a-f]{32}$/i.test(id))
  if (bad !== undefined) throw new UsageError(`a trace id has 32 hexadecimal digits, not '${bad}'`)
  const filter = filterOf(values)
  const filtered = filter.size > 0 || values.errors
  if (ids.length > 0 && filtered) throw new UsageError('a trace id needs no filter')
  return { mode, source: addressOf(values), ids, filter, wanted: values.errors ? hasErrors : () => true, filtered, last: last ?? 1, json: values.json }
}

async function show (trace: TraceView, json: boolean): Promise<number> {
  process.stdout.write(json ? jsonText(trace, 2) : renderWaterfall(trace, terminal()))
  return 0
}

async function compare (source: GatewayAddress, ids: readonly [string, string], json: boolean): Promise<number> {
  const [a, b] = [await existing(source, ids[0]), await existing(source, ids[1])]
  process.stdout.write(json ? jsonText([a, b], 2) : renderComparison(a, b))
  return 0
}

async function existing (source: GatewayAddress, id: string): Promise<TraceView> {
  const trace = await fetchTrace(source, id)
  if (trace === undefined) throw new Error(`the gateway has no trace ${id}: it keeps the newest`)
  return trace
}

/**
 * A trace from a running gateway, once it is complete: engines send their spans a moment after the answer, so it is
 * asked for until it stops growing.
 *
 * @param maxMs how long to wait for that, at most
 * @returns undefined when the gateway has no such trace
 */
export async function fetchTrace (source: GatewayAddress, traceId: string, maxMs = 3_000): Promise<TraceView | undefined> {
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

function filterOf (values: { readonly [name in 'model' | 'plan' | 'status' | 'min-duration' | 'search']?: string | undefined }): URLSearchParams {
  const { model, plan, status, 'min-duration': least, search } = values
  if (status !== undefined && !STATUSES.includes(status)) throw new UsageError(`--status must be one of ${STATUSES.join(', ')}, not '${status}'`)
  if (least !== undefined && !/^\d+(\.\d+)?$/.test(least)) throw new UsageError(`--min-duration must be milliseconds, not '${least}'`)
  const filter = new URLSearchParams()
  for (const [name, value] of Object.entries({ model, plan, status, min_duration_ms: least, search })) if (value !== undefined) filter.set(name, value)
  return filter
}

async function followUntilSignal (source: GatewayAddress, filter: URLSearchParams, wanted: Wanted, json: boolean): Promise<number> {
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
      wanted,
      show: trace => { process.stdout.write(json ? jsonText(trace) : renderWaterfall(trace, terminal()) + '\n') },
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

/** Newest first. */
async function listOf (source: GatewayAddress, filter: URLSearchParams, wanted: Wanted, count: number): Promise<TraceSummary[]> {
  const answer = await read<{ traces: TraceSummary[] }>(source, `/epd/traces?${new URLSearchParams([...filter, ['limit', String(MAX_LISTED)]])}`)
  if (answer === undefined) throw noTraces(source)
  return answer.traces.filter(wanted).slice(0, count)
}
