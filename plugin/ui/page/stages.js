import { el, ms, quantile, svg } from './dom.js'

/** The charted stages: name, title, what is measured. */
const STAGES = [
  ['request', 'Request', 'whole'],
  ['encode', 'Encode', 'call to an encoder'],
  ['handoff', 'Hand-off', 'call to a prefill node'],
  ['generate', 'Generate', 'call to the language model'],
  ['migrate', 'Migrate', 'pulling blocks'],
  ['prefill', 'Prefill', 'in the engine'],
  ['decode', 'Decode', 'in the engine']
]
/** Charted only with prefill nodes. */
const OPTIONAL = 'handoff'
const WINDOW_MS = 120_000
const WIDTH = 240
const HEIGHT = 56

/** A small chart for each stage: a dot for every call, a line for the median. Logarithmic, because stages last 1 ms to 10 s. */
export function showStages (box, state) {
  const charted = STAGES.filter(([stage]) => stage !== OPTIONAL || state.stages[stage]?.length > 0)
  box.replaceChildren(...charted.map(([stage, title, note]) => chart(stage, title, note, state.stages[stage] ?? [], state.at)))
}

function chart (stage, title, note, all, now) {
  const points = all.filter(([at]) => at > now - WINDOW_MS)
  const sorted = points.map(point => point[1]).sort((a, b) => a - b)
  const [low, high] = bounds(sorted)
  const x = at => WIDTH - 3 - (now - at) / WINDOW_MS * (WIDTH - 6)
  const y = value => HEIGHT - 5 - (Math.log10(Math.max(value, 0.01)) - low) / (high - low) * (HEIGHT - 10)
  const p50 = quantile(sorted, 0.5)
  const p95 = quantile(sorted, 0.95)
  const dots = points.map(([at, value, failed]) => svg('circle', { cx: x(at).toFixed(1), cy: y(value).toFixed(1), r: failed ? 2.6 : 1.9, class: failed ? 'failed' : 'point' }))
  const lines = p50 === undefined ? [] : [svg('line', { x1: 0, x2: WIDTH, y1: y(p50).toFixed(1), y2: y(p50).toFixed(1), class: 'median' })]
  const spoken = p50 === undefined ? `${title}: no calls` : `${title}: median ${ms(p50)}, 95th percentile ${ms(p95)}, ${points.length} calls`
  return el('figure', { class: 'stage', data: { stage } },
    el('figcaption', {}, el('b', {}, title), el('span', { title: note }, note)),
    svg('svg', { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: 'none', role: 'img', 'aria-label': spoken }, ...lines, ...dots),
    el('p', {}, p50 === undefined ? 'no calls' : `p50 ${ms(p50)}`, el('span', {}, p95 === undefined ? '' : `p95 ${ms(p95)}`)))
}

/** Powers of ten around the values, at least one decade. */
function bounds (sorted) {
  if (sorted.length === 0) return [0, 2]
  const low = Math.log10(Math.max(sorted[0], 0.01)) - 0.15
  const high = Math.log10(Math.max(sorted.at(-1), 0.01)) + 0.15
  const spare = Math.max(0, 1 - (high - low)) / 2
  return [low - spare, high + spare]
}
