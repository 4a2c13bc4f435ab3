/* global CSS */
import { count, el, ms, nameOf } from './dom.js'
import { failureOf } from './failure.js'
import { axis, bar, childrenOf, extentOf, factsOf, legend, roleOf } from './spans.js'

/** The selected trace: its plan and reason, its pictures, and every span on the time axis. @param comparing another one is still to be chosen */
export function showWaterfall (box, trace, { capture }, comparing) {
  const open = new Set([...box.querySelectorAll('details[open]')].map(row => row.dataset.span))
  const focused = document.activeElement?.closest?.('details')?.dataset.span
  const extent = extentOf(trace)
  box.replaceChildren(
    heading(trace, comparing),
    ...failureOf(trace),
    ...pictures(trace, capture),
    legend(),
    axis(extent.total),
    el('div', { class: 'spans' }, ...rowsOf(trace.spans).map(row => spanRow(row, extent, open)))
  )
  if (focused !== undefined) box.querySelector(`details[data-span="${CSS.escape(focused)}"] summary`)?.focus()
}

function heading (trace, comparing) {
  const { name, traceId, plan, reason, status, durationMs, partial } = trace
  const state = partial ? 'running' : status
  return el('div', { class: 'head' },
    el('div', { class: 'title' }, el('h2', { id: 'detail-title' }, name, ' ', el('small', {}, ms(durationMs))),
      comparing ? el('p', { class: 'hint', role: 'status' }, 'Choose the request to compare this one with.') : '',
      el('button', { type: 'button', name: comparing ? 'end' : 'compare' }, comparing ? 'Cancel' : 'Compare')),
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

/** Depth first; spans that are each other's parents are in no row. */
function rowsOf (spans) {
  const children = childrenOf(spans)
  const rows = []
  const walk = (of, depth) => {
    for (const span of children.get(of) ?? []) {
      rows.push({ span, depth })
      walk(span.spanId, depth + 1)
    }
  }
  walk(null, 0)
  return rows
}

function spanRow ({ span, depth }, extent, open) {
  const role = roleOf(span)
  const failed = span.status.code === 'error'
  const facts = factsOf(span)
  const row = el('details', { class: 'span', data: { span: span.spanId, role }, style: { '--depth': String(depth) } },
    el('summary', { aria: { label: `${span.name}, ${ms(span.durationMs)}, ${facts}` } },
      el('span', { class: failed ? 'name failed' : 'name' }, span.name),
      el('span', { class: 'track' }, bar(span, extent)), el('span', { class: 'took' }, ms(span.durationMs)), el('span', { class: failed ? 'facts failed' : 'facts', title: facts }, facts)),
    attributes(span))
  row.open = open.has(span.spanId)
  return row
}

function attributes (span) {
  const entries = [['service', span.service], ['instance', span.instance], ['start', span.start], ...Object.entries(span.attributes)]
  return el('dl', { class: 'attributes' }, ...entries.filter(([, value]) => value !== null && value !== undefined)
    .map(([key, value]) => el('div', {}, el('dt', {}, key), el('dd', {}, Array.isArray(value) ? value.join(', ') : String(value)))))
}
