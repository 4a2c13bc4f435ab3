/* global EventSource */
import { onAddress, readAddress, writeAddress } from './address.js'
import { Charts } from './charts.js'
import { showComparison, showHalf } from './compare.js'
import { el } from './dom.js'
import { showFigures } from './figures.js'
import { Filter } from './filter.js'
import { NodeView } from './node.js'
import { RequestList } from './requests.js'
import { showTopology } from './topology.js'
import { showWaterfall } from './waterfall.js'

const $ = id => document.getElementById(id)
const HEALTH = { healthy: 'healthy', no_healthy_node: 'no healthy node', draining: 'draining' }
const RETRY_MS = 3_000
/** A trace is complete a moment after its request: engines send their spans 0.2 s after they end. */
const SETTLED_MS = 3_000
/** Requests in the list. */
const LISTED = 60

let state
let paused = false
/** What the detail shows: a trace, how many spans it had, the one it is compared with, and when it ended, on the gateway's clock. */
let shown = { id: '', spans: 0, compare: undefined, end: 0 }
let source
let retry
/** Number of the update that the list shows, and of the newest one: an answer that comes late is dropped. */
let listed = 0
let updates = 0

const filter = new Filter($('filter'), refresh)
const charts = new Charts($('stages'), $('range'), $('ranges'), refresh)
const node = new NodeView($('node'))
const list = new RequestList($('requests'), id => {
  writeAddress({ trace: id })
  showTrace(id).catch(() => {})
})

function connect () {
  disconnect()
  source = new EventSource('feed')
  source.onopen = () => { live('on', 'live') }
  source.onmessage = event => {
    state = JSON.parse(event.data)
    if (!paused) update().catch(() => {})
  }
  source.onerror = () => {
    live('off', source.readyState === EventSource.CLOSED ? 'refused' : 'reconnecting')
    // The browser reconnects after a lost connection, but not after an answer that is not a stream.
    if (source.readyState === EventSource.CLOSED) retry = setTimeout(connect, RETRY_MS)
  }
}

function disconnect () {
  clearTimeout(retry)
  source?.close()
}

function live (mark, text) {
  $('live').dataset.state = mark
  $('live').textContent = text
}

function refresh () {
  if (state !== undefined) update().catch(() => {})
}

async function update () {
  const { status, nodes, models } = state.health
  $('version').textContent = state.version
  $('health').textContent = `${HEALTH[status] ?? status}, ${nodes.healthy} of ${nodes.total} nodes`
  $('health').dataset.state = status === 'healthy' ? 'ok' : 'error'
  showFigures($('figures'), state)
  showTopology($('topology'), state)
  charts.update(state).catch(() => {})
  node.update(state).catch(() => {})
  filter.offer(models)
  const turn = ++updates
  const [traces, found] = await wanted()
  if (turn < listed) return
  listed = turn
  $('found').textContent = found
  list.show(traces, nothing())
  await showSelected(traces)
}

/** The request of the address, else one of the list. */
async function showSelected (traces) {
  const address = readAddress()
  const whole = traces.filter(({ partial }) => !partial)
  const id = address.trace?.toLowerCase() ?? list.selected ?? (whole.find(({ items }) => items > 0) ?? whole[0])?.traceId
  if (id === undefined) return
  const compare = address.compare?.toLowerCase()
  list.mark(id, compare)
  const found = traces.find(({ traceId }) => traceId === id)
  if (found !== undefined && shown.id === id) shown.end = Date.parse(found.start) + found.durationMs
  const news = shown.id !== id || shown.compare !== compare || (found !== undefined && shown.spans !== found.spans)
  if (news || state.at - shown.end < SETTLED_MS) await showTrace(id)
}

function nothing () {
  if (state.traces === null) return `No traces are kept here: ${state.tracesOff}.`
  return state.traces.length === 0 ? 'No requests here yet.' : 'No request like that.'
}

/** The list of the feed, or the filtered one, for which the gateway looks through all that it keeps; and how many were found. */
async function wanted () {
  const query = filter.query()
  if (state.traces === null || query === undefined) return [state.traces ?? [], '']
  query.set('limit', String(LISTED))
  const answer = await fetch(`traces?${query}`)
  const traces = answer.ok ? (await answer.json()).traces : []
  return [traces, traces.length < LISTED ? `${traces.length} found` : `the last ${LISTED}`]
}

async function showTrace (id) {
  const compare = readAddress().compare?.toLowerCase()
  const [trace, other] = await Promise.all([load(id), compare === undefined || compare === id ? undefined : load(compare)])
  // Another one was chosen meanwhile, or there was no answer.
  if (id !== list.selected || compare !== readAddress().compare?.toLowerCase() || trace === undefined) return
  if (trace === null) return showGone(id, compare)
  const [spans, spansOfOther] = [trace, other].map(one => one?.spans?.length)
  const unchanged = shown.id === id && shown.compare === compare && shown.spans === spans && shown.spansOfOther === spansOfOther
  shown = { id, spans, compare, spansOfOther, end: Math.max(...[trace, other].map(one => one ? Date.parse(one.start) + one.durationMs : 0)) }
  if (unchanged) return
  if (other === null) showHalf($('detail'), compare)
  else if (other === undefined) showWaterfall($('detail'), trace, state, compare !== undefined)
  else showComparison($('detail'), other, trace)
}

/** A trace; null when it is not kept, undefined when there is no answer. */
async function load (id) {
  const answer = await fetch(`traces/${id}`)
  return answer.ok ? await answer.json() : answer.status === 404 ? null : undefined
}

function showGone (id, compare) {
  shown = { id, spans: 0, compare, end: 0 }
  $('detail').replaceChildren(el('h2', { id: 'detail-title' }, 'Waterfall'), el('p', { class: 'empty' }, 'This trace is no longer kept: newer ones have taken its place.'))
}

/** The buttons of the detail. The one that is pressed goes away with what it has changed: the focus goes to its successor. */
$('detail').addEventListener('click', event => {
  const { name } = event.target.closest('button') ?? {}
  const { trace = list.selected, compare } = readAddress()
  if (name === 'compare') writeAddress({ trace, compare: trace }, { step: true })
  else if (name === 'swap') writeAddress({ trace: compare, compare: trace })
  else if (name === 'end') writeAddress({ compare: undefined }, { step: true })
  else return
  list.mark(readAddress().trace ?? list.selected, readAddress().compare)
  showTrace(list.selected).then(() => { $('detail').querySelector(name === 'compare' ? 'button[name=end]' : name === 'swap' ? 'button[name=swap]' : 'button[name=compare]')?.focus() }, () => {})
})

onAddress(refresh)
$('skip').addEventListener('click', event => {
  event.preventDefault()
  $('requests').focus()
})
$('pause').addEventListener('click', () => {
  paused = !paused
  $('pause').setAttribute('aria-pressed', String(paused))
  $('pause').textContent = paused ? 'Resume' : 'Pause'
  if (!paused) refresh()
})
// A hidden page sends no requests.
document.addEventListener('visibilitychange', () => {
  if (document.hidden) disconnect()
  else connect()
})
if (!document.hidden) connect()
