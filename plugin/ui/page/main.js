/* global EventSource, Option */
import { el } from './dom.js'
import { showFigures } from './figures.js'
import { RequestList } from './requests.js'
import { showStages } from './stages.js'
import { showTopology } from './topology.js'
import { showWaterfall } from './waterfall.js'

const $ = id => document.getElementById(id)
const HEALTH = { healthy: 'healthy', no_healthy_node: 'no healthy node', draining: 'draining' }
const RETRY_MS = 3_000
/** A trace is complete a moment after its request: engines send their spans 0.2 s after they end. */
const SETTLED_MS = 3_000

let state
let paused = false
let shown = ''
let source
let retry
/** Number of the update that the list shows, and of the newest one: an answer that comes late is dropped. */
let listed = 0
let updates = 0

const list = new RequestList($('requests'), id => { showTrace(id).catch(() => {}) })

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

async function update () {
  const { status, nodes, models } = state.health
  $('version').textContent = state.version
  $('health').textContent = `${HEALTH[status] ?? status}, ${nodes.healthy} of ${nodes.total} nodes`
  $('health').dataset.state = status === 'healthy' ? 'ok' : 'error'
  showFigures($('figures'), state)
  showTopology($('topology'), state)
  showStages($('stages'), state)
  offer(models)
  const turn = ++updates
  const traces = await wanted()
  if (turn < listed) return
  listed = turn
  list.show(traces, nothing())
  if (list.selected === undefined && traces.some(trace => !trace.partial)) list.select((traces.find(trace => !trace.partial && trace.items > 0) ?? traces.find(trace => !trace.partial)).traceId)
  const selected = traces.find(trace => trace.traceId === list.selected)
  const young = selected !== undefined && state.at - Date.parse(selected.start) - selected.durationMs < SETTLED_MS
  if (selected !== undefined && (young || shown !== `${selected.traceId} ${selected.spans}`)) await showTrace(selected.traceId)
}

function nothing () {
  if (state.traces === null) return `No traces are kept here: ${state.tracesOff}.`
  return state.traces.length === 0 ? 'No requests here yet.' : 'No request like that.'
}

/** The list of the feed, or the filtered one. */
async function wanted () {
  if (state.traces === null) return []
  const query = new URLSearchParams()
  const form = new FormData($('filter'))
  for (const name of ['plan', 'status', 'model']) if (form.get(name)) query.set(name, form.get(name))
  if (Number(form.get('min')) > 0) query.set('min_duration_ms', form.get('min'))
  if (query.size === 0) return state.traces ?? []
  query.set('limit', '60')
  const answer = await fetch(`traces?${query}`)
  return answer.ok ? (await answer.json()).traces : []
}

function offer (models) {
  const select = $('filter').elements.model
  if ([...select.options].slice(1).map(option => option.value).join('\n') === models.join('\n')) return
  const chosen = select.value
  select.replaceChildren(select.options[0], ...models.map(model => new Option(model, model)))
  select.value = models.includes(chosen) ? chosen : ''
}

async function showTrace (id) {
  const answer = await fetch(`traces/${id}`)
  const trace = answer.ok ? await answer.json() : undefined
  if (id !== list.selected) return
  if (answer.status === 404) showGone()
  if (trace === undefined) return
  const key = `${trace.traceId} ${trace.spans.length}`
  if (key === shown) return
  shown = key
  showWaterfall($('detail'), trace, state)
}

function showGone () {
  shown = ''
  $('detail').replaceChildren(el('h2', { id: 'detail-title' }, 'Waterfall'), el('p', { class: 'empty' }, 'This trace is no longer kept: newer ones have taken its place.'))
}

$('filter').addEventListener('input', () => { if (state !== undefined) update().catch(() => {}) })
$('filter').addEventListener('submit', event => { event.preventDefault() })
$('pause').addEventListener('click', () => {
  paused = !paused
  $('pause').setAttribute('aria-pressed', String(paused))
  $('pause').textContent = paused ? 'Resume' : 'Pause'
  if (!paused && state !== undefined) update().catch(() => {})
})
// A hidden page sends no requests.
document.addEventListener('visibilitychange', () => {
  if (document.hidden) disconnect()
  else connect()
})
if (!document.hidden) connect()
