/* global EventSource */
import { onAddress, readAddress, writeAddress } from './address.js'
import { Charts } from './charts.js'
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
/** What the detail shows: the trace and how many spans it had. */
let shown = ''
/** When that trace ended, on the gateway's clock. */
let shownEnd = 0
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
  const traces = await wanted()
  if (turn < listed) return
  listed = turn
  list.show(traces, nothing())
  await showSelected(traces)
}

/** The request of the address, else one of the list. */
async function showSelected (traces) {
  const { trace } = readAddress()
  const whole = traces.filter(({ partial }) => !partial)
  const id = trace?.toLowerCase() ?? list.selected ?? (whole.find(({ items }) => items > 0) ?? whole[0])?.traceId
  if (id === undefined) return
  if (id !== list.selected) list.mark(id)
  const found = traces.find(({ traceId }) => traceId === id)
  if (found !== undefined) shownEnd = Date.parse(found.start) + found.durationMs
  const news = found === undefined ? !shown.startsWith(id) : shown !== `${id} ${found.spans}`
  if (news || state.at - shownEnd < SETTLED_MS) await showTrace(id)
}

function nothing () {
  if (state.traces === null) return `No traces are kept here: ${state.tracesOff}.`
  return state.traces.length === 0 ? 'No requests here yet.' : 'No request like that.'
}

/** The list of the feed, or the filtered one, for which the gateway looks through all that it keeps. */
async function wanted () {
  const query = filter.query()
  $('found').textContent = ''
  if (state.traces === null || query === undefined) return state.traces ?? []
  query.set('limit', String(LISTED))
  const answer = await fetch(`traces?${query}`)
  const traces = answer.ok ? (await answer.json()).traces : []
  $('found').textContent = traces.length < LISTED ? `${traces.length} found` : `the last ${LISTED}`
  return traces
}

async function showTrace (id) {
  const answer = await fetch(`traces/${id}`)
  const trace = answer.ok ? await answer.json() : undefined
  if (id !== list.selected) return
  if (answer.status === 404) showGone(id)
  if (trace === undefined) return
  shownEnd = Date.parse(trace.start) + trace.durationMs
  const key = `${trace.traceId} ${trace.spans.length}`
  if (key === shown) return
  shown = key
  showWaterfall($('detail'), trace, state)
}

function showGone (id) {
  shown = `${id} gone`
  shownEnd = 0
  $('detail').replaceChildren(el('h2', { id: 'detail-title' }, 'Waterfall'), el('p', { class: 'empty' }, 'This trace is no longer kept: newer ones have taken its place.'))
}

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
