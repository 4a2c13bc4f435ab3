import { ATTR, SPAN } from '../../adapters/wire/semconv.ts'
import type { SpanView, TraceView } from '../traces/view.ts'
import { clean, duration } from './terminal.ts'

export interface WaterfallOptions {
  /** Columns of the terminal. @default 100 */
  readonly width?: number
  /** ANSI colours, one for each role. @default false */
  readonly color?: boolean
}

export interface Row { readonly span: SpanView, readonly depth: number }

const DEFAULT_WIDTH = 100
const MIN_WIDTH = 60
const MIN_BAR = 16
/** What stands beside a bar, in this order, and how. */
const FACTS: ReadonlyArray<readonly [key: string, show: (value: string) => string]> = [
  [ATTR.topology, value => value],
  [ATTR.reason, value => `(${value})`],
  [ATTR.node, value => value.replace(/^https?:\/\//, '')],
  [ATTR.peer, value => `from ${value.replace(/^https?:\/\//, '')}`],
  [ATTR.items, value => counted(value, 'item')],
  [ATTR.tokens, value => counted(value, 'token')],
  [ATTR.inputTokens, value => `${value} in`],
  [ATTR.outputTokens, value => `${value} out`],
  // vLLM's own names.
  ['gen_ai.usage.prompt_tokens', value => `${value} in`],
  ['gen_ai.usage.completion_tokens', value => `${value} out`],
  ['gen_ai.latency.time_in_queue', seconds => `queued ${duration(Number(seconds) * 1_000)}`],
  ['gen_ai.latency.time_to_first_token', seconds => `first token ${duration(Number(seconds) * 1_000)}`],
  [ATTR.cached, value => (value === '0' || value === 'false' ? '' : value === 'true' ? 'cached' : `${value} cached`)],
  [ATTR.ahead, value => (value === '0' ? '' : `${value} ahead`)],
  [ATTR.bytes, bytes],
  [ATTR.blocks, value => counted(value, 'block')],
  [ATTR.link, value => value],
  [ATTR.batch, value => `batch ${value}`],
  [ATTR.retries, value => (value === '0' ? '' : `${value} retries`)]
]
const COLORS: ReadonlyArray<readonly [prefix: string, sgr: number]> = [
  [SPAN.encode, 36], [SPAN.engineEncode, 36], [SPAN.enginePreprocess, 36], [SPAN.engineMigrate, 33], [SPAN.engineAhead, 33],
  [SPAN.enginePrepare, 35], [SPAN.prefill, 35], [SPAN.enginePrefill, 35], [SPAN.decode, 32], [SPAN.engineDecode, 32]
]

/** A trace as lines of text: a row for each span with its place in time, its duration and the facts that explain it. */
export function renderWaterfall (trace: TraceView, options: WaterfallOptions = {}): string {
  const width = Math.max(options.width ?? DEFAULT_WIDTH, MIN_WIDTH)
  const paint = options.color === true ? (text: string, sgr: number) => `\x1b[${sgr}m${text}\x1b[0m` : (text: string) => text
  const rows = rowsOf(trace.spans)
  const zero = Math.min(...rows.map(({ span }) => span.offsetMs))
  const total = Math.max(...rows.map(({ span }) => span.offsetMs + span.durationMs)) - zero
  const nameWidth = Math.min(Math.max(...rows.map(({ span, depth }) => depth * 2 + span.name.length)), Math.floor(width * 0.4))
  const barWidth = Math.max(MIN_BAR, Math.floor((width - nameWidth - 12) * 0.45))
  const lines = rows.map(({ span, depth }) => {
    const name = cut(' '.repeat(depth * 2) + span.name, nameWidth).padEnd(nameWidth)
    const bar = barOf(span, zero, total, barWidth)
    const head = `${name} ${paint(bar, colorOf(span))} ${duration(span.durationMs).padStart(8)}`
    const room = width - nameWidth - barWidth - 11
    const facts = cut(factsOf(span).join('  '), room)
    return (facts === '' ? head : `${head} ${span.status.code === 'error' ? paint(facts, 31) : facts}`).trimEnd()
  })
  return [`trace ${clean(trace.traceId)}  ${clean(trace.name)}  ${clean(trace.status)}  ${duration(trace.durationMs)}`, ...lines].join('\n') + '\n'
}

/** Depth first, children in order of their start. A span whose parent is not here stands at the top. */
export function rowsOf (spans: readonly SpanView[]): Row[] {
  const ids = new Set(spans.map(span => span.spanId))
  const children = new Map<string | null, SpanView[]>()
  for (const span of spans) {
    const parent = span.parentSpanId !== null && ids.has(span.parentSpanId) ? span.parentSpanId : null
    const list = children.get(parent)
    if (list === undefined) children.set(parent, [span])
    else list.push(span)
  }
  const rows: Row[] = []
  const seen = new Set<string>()
  const walk = (parent: string | null, depth: number): void => {
    for (const span of children.get(parent) ?? []) {
      if (seen.has(span.spanId)) continue
      seen.add(span.spanId)
      rows.push({ span, depth })
      walk(span.spanId, depth + 1)
    }
  }
  walk(null, 0)
  return rows
}

function barOf (span: SpanView, zero: number, total: number, width: number): string {
  const scale = total === 0 ? 0 : width / total
  const from = Math.min(width - 1, Math.floor((span.offsetMs - zero) * scale))
  const length = Math.max(1, Math.min(width - from, Math.round(span.durationMs * scale)))
  return '·'.repeat(from) + '█'.repeat(length) + '·'.repeat(width - from - length)
}

/** What explains a span, in the words that stand beside its bar. */
export function factsOf (span: SpanView): string[] {
  const facts = FACTS.flatMap(([key, show]) => {
    const value = span.attributes[key]
    return value === undefined ? [] : [show(String(value))]
  })
  if (span.attributes[ATTR.node] === undefined && span.instance !== null) facts.unshift(`@ ${span.instance.replace(/^https?:\/\//, '')}`)
  if (span.status.code === 'error') facts.unshift(['ERROR', span.attributes[ATTR.errorType], span.status.message].filter(part => part !== undefined).join(' '))
  if (span.attributes[ATTR.aborted] === true) facts.unshift('client left')
  return facts.filter(fact => fact !== '')
}

function colorOf (span: SpanView): number {
  if (span.status.code === 'error') return 31
  return COLORS.find(([prefix]) => span.name.startsWith(prefix))?.[1] ?? 37
}

function counted (value: string, noun: string): string {
  return `${value} ${noun}${value === '1' ? '' : 's'}`
}

function bytes (value: string): string {
  const count = Number(value)
  if (count >= 1_048_576) return `${(count / 1_048_576).toFixed(1)} MiB`
  return count >= 1_024 ? `${(count / 1_024).toFixed(1)} KiB` : `${value} B`
}

function cut (text: string, width: number): string {
  const shown = clean(text)
  return shown.length <= width ? shown : width <= 1 ? '' : shown.slice(0, width - 1) + '…'
}
