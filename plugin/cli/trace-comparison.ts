import { ATTR } from '../../adapters/wire/semconv.ts'
import type { SpanView, TraceView } from '../traces/view.ts'
import { clean, duration, table } from './terminal.ts'
import { factsOf, rowsOf } from './waterfall.ts'

/** The spans of one name below the same parents. */
interface Stage {
  readonly name: string
  readonly depth: number
  count: number
  ms: number
  readonly facts: Set<string>
}

/** Shown of a difference in facts, at most. */
const FACTS_WIDTH = 60

/** Two traces stage by stage, and what differs. */
export function renderComparison (a: TraceView, b: TraceView): string {
  const [ofA, ofB] = [stagesOf(a), stagesOf(b)]
  const stages = merge([...ofA.keys()], [...ofB.keys()]).map(path => [ofA.get(path), ofB.get(path)] as const)
  return [
    `A  trace ${clean(a.traceId)}\nB  trace ${clean(b.traceId)}\n`,
    table([
      ['', 'A', 'B', 'B - A'],
      ['model', a.model ?? '-', b.model ?? '-', ''],
      ['plan', a.plan ?? '-', b.plan ?? '-', ''],
      ['reason', a.reason ?? '-', b.reason ?? '-', ''],
      ['status', endOf(a), endOf(b), ''],
      ['retries', String(a.retries), String(b.retries), ''],
      ['tokens', tokensOf(a), tokensOf(b), ''],
      ['first token', ...compared(a.firstTokenMs, b.firstTokenMs)],
      ['per token', ...compared(a.perTokenMs, b.perTokenMs)],
      ['whole', ...compared(a.durationMs, b.durationMs)]
    ]),
    table([
      ['STAGE', 'A', 'B', 'B - A', 'WHAT DIFFERS'],
      ...stages.map(([one, other]) => [nameOf(one, other), ...compared(one?.ms, other?.ms), differenceOf(one, other)])
    ])
  ].join('\n')
}

/** In the order of the waterfall; spans of one name and parent are one stage. */
function stagesOf (trace: TraceView): Map<string, Stage> {
  const stages = new Map<string, Stage>()
  const parents: string[] = []
  for (const { span, depth } of rowsOf(trace.spans)) {
    parents.length = depth
    parents.push(nameIn(span))
    const path = parents.join('\n')
    const stage = stages.get(path) ?? { name: span.name, depth, count: 0, ms: 0, facts: new Set<string>() }
    stages.set(path, stage)
    stage.count++
    stage.ms += span.durationMs
    for (const fact of factsOf(span)) stage.facts.add(fact)
  }
  return stages
}

/** The request's own span has the model in its name, which may be another in the other trace. */
function nameIn ({ name, attributes }: SpanView): string {
  return attributes[ATTR.operation] === undefined ? name : String(attributes[ATTR.operation])
}

/** The paths of both: what only the second has stands behind what was before it there. */
function merge (first: readonly string[], second: readonly string[]): string[] {
  const merged = [...first]
  let at = 0
  for (const path of second) {
    const found = merged.indexOf(path)
    if (found === -1) merged.splice(at++, 0, path)
    else at = Math.max(at, found + 1)
  }
  return merged
}

function nameOf (one: Stage | undefined, other: Stage | undefined): string {
  const { name, depth } = (one ?? other)!
  const counts = [one?.count ?? 0, other?.count ?? 0]
  return `${'  '.repeat(depth)}${name}${counts.some(count => count > 1) ? ` (${counts[0]} and ${counts[1]})` : ''}`
}

function differenceOf (one: Stage | undefined, other: Stage | undefined): string {
  if (one === undefined || other === undefined) return one === undefined ? 'only in B' : 'only in A'
  const only = (these: Stage, those: Stage): string => cut([...these.facts].filter(fact => !those.facts.has(fact)).join('  '))
  const [left, right] = [only(one, other), only(other, one)]
  return left === '' && right === '' ? '' : `${left === '' ? '-' : left} | ${right === '' ? '-' : right}`
}

function cut (text: string): string {
  const shown = clean(text)
  return shown.length <= FACTS_WIDTH ? shown : shown.slice(0, FACTS_WIDTH - 1) + '…'
}

/** Both times, and how much longer the second is. */
function compared (one: number | undefined, other: number | undefined): [string, string, string] {
  const shown = (ms: number | undefined): string => ms === undefined ? '-' : duration(ms)
  if (one === undefined || other === undefined) return [shown(one), shown(other), '']
  const percent = one > 0 ? ` (${other < one ? '-' : '+'}${Math.abs((other - one) / one * 100).toFixed(0)} %)` : ''
  return [shown(one), shown(other), `${other < one ? '-' : '+'}${duration(Math.abs(other - one))}${percent}`]
}

function endOf ({ status, error }: TraceView): string {
  return error === undefined ? status : `${status} ${error.code}`
}

function tokensOf ({ inputTokens, outputTokens }: TraceView): string {
  return `${inputTokens ?? '-'} in, ${outputTokens ?? '-'} out`
}
