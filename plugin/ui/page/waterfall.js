/* global CSS */
import { bytes, count, el, ms, named, nameOf } from './dom.js'
import { failureOf } from './failure.js'

const ROLE_OF = [
  ['engine.migrate', 'migrate'], ['engine.preprocess', 'encode'], ['engine.encode', 'encode'], ['epd.encode', 'encode'],
  ['engine.prefill', 'prefill'], ['epd.prefill', 'prefill'], ['engine.decode', 'decode'], ['epd.decode', 'decode'], ['epd.plan', 'plan']
]
/** Attributes shown beside a bar, in this order. Spans come from any engine, so a value may have any type. */
const FACTS = [
  ['epd.topology', value => value],
  ['epd.node', nameOf],
  ['epd.peer', value => `from ${String(value).split(',').map(nameOf).join(', ')}`],
  ['epd.items', value => count(value, 'item')],
  ['epd.tokens', value => count(value, 'token')],
  ['gen_ai.usage.input_tokens', value => `${value} in`],
  ['gen_ai.usage.output_tokens', value => `${value} out`],
  ['epd.cached', value => value === true ? 'cached' : value > 0 ? `${value} cached` : ''],
  ['epd.bytes', value => value > 0 ? bytes(value) : ''],
  ['epd.link', value => value],
  ['epd.batch', value => value > 1 ? `batch ${value}` : ''],
  ['epd.queue_ms', value => value >= 0.5 ? `waited ${ms(Number(value))}` : ''],
  ['epd.retries', value => value > 0 ? `${value} retried` : '']
]

/** The selected trace: its plan and reason, its pictures, and every span on the time axis. */
export function showWaterfall (box, trace, { capture }) {
  const open = new Set([...box.querySelectorAll('details[open]')].map(row => row.dataset.span))
  const focused = document.activeElement?.closest?.('details')?.dataset.span
  const scale = scaleOf(trace)
  box.replaceChildren(
    heading(trace),
    ...failureOf(trace),
    ...pictures(trace, capture),
    legend(),
    el('div', { class: 'axis', aria: { hidden: 'true' } }, ...scale.ticks.map(tick => el('span', { style: { 'inset-inline-start': `${tick.at}%` } }, tick.label))),
    el('div', { class: 'spans' }, ...rowsOf(trace.spans).map(row => spanRow(row, scale, open)))
  )
  if (focused !== undefined) box.querySelector(`details[data-span="${CSS.escape(focused)}"] summary`)?.focus()
}

function heading (trace) {
  const { name, traceId, plan, reason, status, durationMs, partial } = trace
  const state = partial ? 'running' : status
  return el('div', { class: 'head' },
    el('h2', { id: 'detail-title' }, name, ' ', el('small', {}, ms(durationMs))),
    el('p', { class: 'why' }, el('span', { class: 'plan', data: { plan: plan ?? 'none' } }, plan ?? 'none'), el('span', { class: 'pill', data: { state } }, state), reason === undefined ? '' : el('span', {}, reason)),
    el('p', { class: 'id' }, 'trace ', el('code', {}, traceId)),
    el('dl', { class: 'sums' }, ...sums(trace).map(([name, value]) => el('div', {}, el('dt', {}, name), el('dd', {}, value)))))
}

/** What the request was worth, in figures: those that are known. */
function sums ({ firstTokenMs, perTokenMs, tokensPerSecond, inputTokens, outputTokens, key }) {
  return [
    ['first token', firstTokenMs === undefined ? undefined : ms(firstTokenMs)],
    ['per token', perTokenMs === undefined ? undefined : ms(perTokenMs)],
    ['rate', tokensPerSecond === undefined ? undefined : `${tokensPerSecond.toFixed(tokensPerSecond >= 10 ? 0 : 1)} tokens/s`],
    ['tokens', inputTokens === undefined && outputTokens === undefined ? undefined : `${inputTokens ?? '?'} → ${outputTokens ?? '?'}`],
    ['key', key]
  ].filter(([, value]) => value !== undefined)
}

/** The encoder of each picture, and whether it was cached. */
function pictures (trace, capture) {
  const encode = trace.spans.findLast(span => span.name === 'epd.encode')
  const encoders = encode?.attributes['epd.encoders']
  if (!Array.isArray(encoders)) return []
  const tokens = encode.attributes['epd.item.tokens'] ?? []
  const cached = encode.attributes['epd.item.cached'] ?? []
  return [el('ol', { class: 'pictures', aria: { label: 'Pictures' } }, ...encoders.map((encoder, i) => el('li', {},
    picture(trace.traceId, i, capture),
    el('div', {}, el('b', {}, `picture ${i + 1}`), el('span', { class: cached[i] ? 'badge hit' : 'badge' }, cached[i] ? 'cached' : 'encoded'),
      el('span', { title: encoder }, nameOf(encoder)), el('span', {}, tokens[i] === undefined ? '' : count(tokens[i], 'token'))))))]
}

function picture (traceId, index, capture) {
  if (!capture) return el('span', { class: 'nothumb', title: 'telemetry.captureContent is off', aria: { hidden: 'true' } })
  return el('img', { src: `pictures/${traceId}/${index}`, alt: `picture ${index + 1}` })
}

function legend () {
  return el('p', { class: 'legend', aria: { hidden: 'true' } }, ...['plan', 'encode', 'migrate', 'prefill', 'decode'].map(role => el('span', { data: { role } }, role)))
}

function scaleOf ({ spans }) {
  const zero = Math.min(...spans.map(span => span.offsetMs))
  const total = Math.max(0.001, Math.max(...spans.map(span => span.offsetMs + span.durationMs)) - zero)
  const rough = total / 6
  const power = 10 ** Math.floor(Math.log10(rough))
  const step = [1, 2, 5, 10].map(factor => factor * power).find(size => size >= rough)
  const ticks = []
  for (let at = 0; at <= total * 0.96; at += step) ticks.push({ at: (100 * at / total).toFixed(2), label: at === 0 ? '0' : at >= 1_000 ? `${+(at / 1_000).toPrecision(3)} s` : `${+at.toPrecision(3)} ms` })
  return { zero, total, ticks }
}

/** Depth first, children in order of their start; a span without its parent is a root. */
function rowsOf (spans) {
  const ids = new Set(spans.map(span => span.spanId))
  const children = Map.groupBy === undefined ? groupBy(spans, parent) : Map.groupBy(spans, parent)
  function parent (span) { return ids.has(span.parentSpanId) && span.parentSpanId !== span.spanId ? span.parentSpanId : null }
  const rows = []
  const seen = new Set()
  const walk = (of, depth) => {
    for (const span of children.get(of) ?? []) {
      if (seen.has(span.spanId)) continue
      seen.add(span.spanId)
      rows.push({ span, depth })
      walk(span.spanId, depth + 1)
    }
  }
  walk(null, 0)
  return rows
}

function groupBy (list, key) {
  const groups = new Map()
  for (const one of list) groups.set(key(one), [...groups.get(key(one)) ?? [], one])
  return groups
}

function spanRow ({ span, depth }, { zero, total }, open) {
  const role = ROLE_OF.find(([prefix]) => span.name.startsWith(prefix))?.[1] ?? 'request'
  const failed = span.status.code === 'error'
  const start = 100 * (span.offsetMs - zero) / total
  const bar = el('i', { class: failed ? 'failed' : '', style: { 'inset-inline-start': `${Math.min(start, 99.6).toFixed(3)}%`, 'inline-size': `${Math.max(0.4, 100 * span.durationMs / total).toFixed(3)}%` } })
  const facts = factsOf(span)
  const row = el('details', { class: 'span', data: { span: span.spanId, role }, style: { '--depth': String(depth) } },
    el('summary', { aria: { label: `${span.name}, ${ms(span.durationMs)}, ${facts}` } },
      el('span', { class: failed ? 'name failed' : 'name' }, span.name),
      el('span', { class: 'track' }, bar), el('span', { class: 'took' }, ms(span.durationMs)), el('span', { class: failed ? 'facts failed' : 'facts', title: facts }, facts)),
    attributes(span))
  row.open = open.has(span.spanId)
  return row
}

function factsOf (span) {
  const facts = FACTS.flatMap(([key, show]) => span.attributes[key] === undefined ? [] : [show(span.attributes[key])])
  if (span.attributes['epd.node'] === undefined && span.instance !== null) facts.unshift(nameOf(span.instance))
  if (span.status.code === 'error') facts.unshift([span.attributes['error.type'], named(span.status.message)].filter(Boolean).join(': '))
  if (span.attributes['epd.aborted'] === true) facts.unshift('client left')
  return facts.filter(Boolean).join(' · ')
}

function attributes (span) {
  const entries = [['service', span.service], ['instance', span.instance], ['start', span.start], ...Object.entries(span.attributes)]
  return el('dl', { class: 'attributes' }, ...entries.filter(([, value]) => value !== null && value !== undefined)
    .map(([key, value]) => el('div', {}, el('dt', {}, key), el('dd', {}, Array.isArray(value) ? value.join(', ') : String(value)))))
}
