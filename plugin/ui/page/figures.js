import { addressWith } from './address.js'
import { el, ms, percent } from './dom.js'

const WINDOW_MS = 60_000
const YOUNG_S = 5
/** [at, requests ended, items, cached] of the last minute. */
const history = []

/** The row of figures at the top: now, and over the last minute. */
export function showFigures (list, state) {
  const ended = state.requests.reduce((sum, one) => sum + one.count, 0)
  const [bad, refused] = ['error', 'refused'].map(outcome => state.requests.filter(one => one.outcome === outcome).reduce((sum, one) => sum + one.count, 0))
  const items = state.nodes.reduce((sum, node) => sum + node.encoded, 0)
  const cached = state.nodes.reduce((sum, node) => sum + node.cached, 0)
  // Counters that decrease belong to a gateway that restarted.
  if (history.length > 0 && (ended < history.at(-1)[1] || items < history.at(-1)[2])) history.length = 0
  history.push([state.at, ended, items, cached])
  while (history.length > 2 && history[0][0] < state.at - WINDOW_MS) history.shift()
  const first = history[0]
  const seconds = (state.at - first[0]) / 1_000
  const perSecond = seconds >= YOUNG_S ? (ended - first[1]) / seconds : lately(state, ended)
  const recent = items - first[2]
  show(list, 'Requests', rate(perSecond), `${ended.toLocaleString('en')} in all`)
  show(list, 'In flight', String(state.inFlight), state.admission.waiting > 0 ? `${state.admission.waiting} waiting` : 'none waiting')
  showTime(list, 'Latency', state.lately.request)
  showTime(list, 'First token', state.lately.firstToken)
  const perToken = state.lately.perToken?.p50 ?? null
  show(list, 'Per token', perToken === null ? '–' : ms(perToken), perToken === null ? 'no streams yet' : `${rateOf(1_000 / perToken)} tokens/s a stream`)
  show(list, 'Encoder cache hits', recent > 0 ? percent(cached - first[3], recent) : percent(cached, items), items === 0 ? 'no pictures yet' : `${cached.toLocaleString('en')} of ${items.toLocaleString('en')} pictures`)
  show(list, 'Vision tokens', state.admission.inFlight.toLocaleString('en'), 'in flight')
  show(list, 'Errors', bad.toLocaleString('en'), `${refused.toLocaleString('en')} refused, ${state.retries.toLocaleString('en')} retried`, bad > 0 ? { status: 'error' } : undefined)
}

/** Of the last five minutes. */
function showTime (list, name, sum) {
  show(list, name, sum === undefined || sum.p50 === null ? '–' : ms(sum.p50), sum === undefined || sum.p95 === null ? 'p95 –' : `p95 ${ms(sum.p95)}`)
}

/** Requests a second, estimated from the newest ones for a page that has just been opened. */
function lately ({ traces, at }, ended) {
  const starts = (traces ?? []).map(trace => Date.parse(trace.start)).filter(start => start > at - YOUNG_S * 1_000)
  if (starts.length === 0) return 0
  // At a high rate the list does not reach back a minute.
  const full = starts.length === traces.length && ended > starts.length
  return starts.length / (full ? Math.max(at - Math.min(...starts), 1) / 1_000 : YOUNG_S)
}

/** Changed in place, so that a focused link keeps the focus. @param bad the filter that shows what is bad */
function show (list, name, value, note, bad) {
  let figure = list.querySelector(`[data-name="${name}"]`)
  if (figure === null) {
    figure = el('div', { class: 'figure', data: { name } }, el('dt', {}, name), el('dd', {}, el('b'), el('span')))
    list.append(figure)
  }
  figure.classList.toggle('bad', bad !== undefined)
  const title = figure.firstChild
  if ((bad !== undefined) !== (title.firstElementChild !== null)) title.replaceChildren(bad === undefined ? name : el('a', {}, name))
  if (bad !== undefined) title.firstElementChild.setAttribute('href', addressWith(bad))
  const [number, beside] = figure.lastChild.children
  number.textContent = value
  beside.textContent = note
}

function rate (perSecond) {
  return `${rateOf(perSecond)}/s`
}

function rateOf (value) {
  return value >= 10 ? value.toFixed(0) : value.toFixed(1)
}
