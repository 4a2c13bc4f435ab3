import { count, el, ms, nameOf } from './dom.js'
import { axis, bar, childrenOf, extentOf, factsOf, legend, roleOf } from './spans.js'

/** Smaller differences are noise. */
const [NOTABLE_MS, NOTABLE_SHARE] = [1, 0.1]

/** Two traces beside each other, stage by stage, on one time axis. B is compared with A. */
export function showComparison (box, a, b) {
  const [extentA, extentB] = [extentOf(a), extentOf(b)]
  const total = Math.max(extentA.total, extentB.total)
  box.replaceChildren(
    el('div', { class: 'head' }, el('div', { class: 'title' }, el('h2', { id: 'detail-title' }, 'Comparison'),
      el('button', { type: 'button', name: 'swap' }, 'Swap'), el('button', { type: 'button', name: 'end' }, 'End'))),
    el('div', { class: 'table sides', role: 'table', aria: { label: 'The two requests' } },
      row([el('span', { class: 'spoken' }, 'figure'), mark('a', 'A'), mark('b', 'B'), 'B − A'], 'columnheader'),
      ...figures(a, b).map(([name, ofA, ofB, difference = '']) => row([name, ofA, ofB, difference]))),
    legend(),
    axis(total),
    el('div', { class: 'table stages-of', role: 'table', aria: { label: 'Their stages' } },
      row(['stage', el('span', {}, 'A above B'), 'A', 'B', 'B − A'], 'columnheader'),
      ...stagesOf(a.spans, b.spans).map(pair => stage(pair, { ...extentA, total }, { ...extentB, total })))
  )
}

/** One of the two requests is no longer kept. */
export function showHalf (box, trace) {
  box.replaceChildren(el('div', { class: 'head' }, el('div', { class: 'title' }, el('h2', { id: 'detail-title' }, 'Comparison'), el('button', { type: 'button', name: 'end' }, 'End'))),
    el('p', { class: 'empty' }, `The trace ${trace} is no longer kept: newer ones have taken its place.`))
}

function mark (side, text) {
  return el('b', { class: `side ${side}` }, text)
}

function row (cells, role = 'cell') {
  return el('div', { role: 'row' }, ...cells.map((cell, i) => el('span', { role: role === 'cell' && i === 0 ? 'rowheader' : role }, cell)))
}

function figures (a, b) {
  return [
    ['request', head(a), head(b)],
    ['plan', a.plan ?? 'none', b.plan ?? 'none', a.plan === b.plan ? '' : 'another'],
    ['status', status(a), status(b)],
    ['duration', ms(a.durationMs), ms(b.durationMs), difference(a.durationMs, b.durationMs)],
    ['first token', optional(a.firstTokenMs), optional(b.firstTokenMs), difference(a.firstTokenMs, b.firstTokenMs)],
    ['per token', optional(a.perTokenMs), optional(b.perTokenMs), difference(a.perTokenMs, b.perTokenMs)],
    ['tokens', tokens(a), tokens(b)],
    ['media', count(a.items, 'item'), count(b.items, 'item')],
    ['nodes', names(a.nodes), names(b.nodes)],
    ['failed calls', String(a.failures.length), String(b.failures.length)]
  ].filter(([, ofA, ofB]) => ofA !== '–' || ofB !== '–')
}

function head ({ name, start }) {
  return el('span', {}, name, ' ', el('small', {}, new Date(start).toLocaleTimeString('en-GB', { hour12: false })))
}

function status ({ partial, status, error }) {
  return partial ? 'running' : error === undefined ? status : `${status}: ${error.code}`
}

function optional (value) {
  return value === undefined ? '–' : ms(value)
}

function tokens ({ inputTokens, outputTokens }) {
  return inputTokens === undefined && outputTokens === undefined ? '–' : `${inputTokens ?? '?'} → ${outputTokens ?? '?'}`
}

function names (nodes) {
  return nodes.length === 0 ? '–' : nodes.map(nameOf).join(' ')
}

function difference (a, b) {
  if (a === undefined || b === undefined) return ''
  const delta = b - a
  const notable = Math.abs(delta) >= NOTABLE_MS && Math.abs(delta) >= NOTABLE_SHARE * a
  const factor = a > 0 && b / a < 1_000 ? ` ×${(b / a).toPrecision(2)}` : ''
  return el('span', { class: notable ? (delta > 0 ? 'slower' : 'faster') : 'same' }, `${delta < 0 ? '−' : '+'}${ms(Math.abs(delta))}`, el('small', {}, notable ? factor : ''))
}

function stage ({ name, depth, a, b }, extentA, extentB) {
  const [factsA, factsB] = [a, b].map(span => span === undefined ? '' : factsOf(span))
  const missing = a === undefined ? 'only in B' : b === undefined ? 'only in A' : undefined
  const cells = [
    el('span', { class: 'name', style: { '--depth': String(depth) } }, name),
    el('span', { class: 'tracks', aria: { hidden: 'true' } }, track('a', a, extentA), track('b', b, extentB)),
    a === undefined ? '–' : ms(a.durationMs),
    b === undefined ? '–' : ms(b.durationMs),
    missing ?? difference(a.durationMs, b.durationMs)
  ]
  const line = row(cells)
  line.dataset.role = roleOf(a ?? b)
  if (factsA !== factsB) line.firstChild.append(...[['A', factsA], ['B', factsB]].filter(([, facts]) => facts !== '').map(([side, facts]) => el('small', { style: { '--depth': String(depth) }, title: facts }, `${side}: ${facts}`)))
  return line
}

function track (side, span, extent) {
  return el('span', { class: `track ${side}` }, span === undefined ? '' : bar(span, extent))
}

/**
 * The stages of both, depth first: spans of one name below the same stage belong together in the order of their start,
 * so the second attempt is compared with the second.
 */
function stagesOf (spansA, spansB) {
  const [childrenA, childrenB] = [childrenOf(spansA), childrenOf(spansB)]
  const stages = []
  const walk = (ofA, ofB, depth) => {
    for (const [name, a, b] of pairsOf(ofA, ofB)) {
      stages.push({ name, depth, a, b })
      walk(a === undefined ? [] : childrenA.get(a.spanId) ?? [], b === undefined ? [] : childrenB.get(b.spanId) ?? [], depth + 1)
    }
  }
  walk(childrenA.get(null) ?? [], childrenB.get(null) ?? [], 0)
  return stages
}

/** Name, span of A, span of B: in A's order; what only B has comes after what is before it in B. */
function pairsOf (ofA, ofB) {
  const [a, b] = [numbered(ofA), numbered(ofB)]
  const order = [...a.keys()]
  let at = 0
  for (const key of b.keys()) {
    if (a.has(key)) at = order.indexOf(key) + 1
    else order.splice(at++, 0, key)
  }
  return order.map(key => [key.slice(0, key.lastIndexOf(' ')), a.get(key), b.get(key)])
}

/** The spans by their name and which one of that name they are. */
function numbered (spans) {
  const seen = new Map()
  return new Map(spans.map(span => {
    const name = span.attributes['gen_ai.operation.name'] === undefined ? span.name : 'request'
    const nth = (seen.get(name) ?? 0) + 1
    seen.set(name, nth)
    return [`${name} ${nth}`, span]
  }))
}
