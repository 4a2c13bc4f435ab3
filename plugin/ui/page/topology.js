/* global addEventListener, CSS */
import { bytes, count, el, nameNodes, nameOf, percent, shortId, svg } from './dom.js'

const COLUMNS = [['encoder', 'Encode'], ['prefill', 'Prefill'], ['decode', 'Decode'], ['hybrid', 'Prefill + decode']]
/** Tokens or calls that fill a node's bar: of encoders vision tokens, of prefill nodes prompt tokens. */
const FULL_TOKENS = { encoder: 4_096, prefill: 16_384 }
const FULL_CALLS = 16
/** With more links than that a map is lines, not labels. */
const LABELLED = 40
const STATES = { linked: 'linked', linking: 'linking', failed: 'failed', refused: 'refused', none: 'not linked' }

let shape = ''
let redraw = () => {}
const speeds = new Map()
const seen = new Map()

/** Nodes in columns by role, with the links over which features and KV blocks move. Rebuilt when nodes come and go, else only its numbers change. */
export function showTopology (box, state) {
  nameNodes(state.nodes)
  for (const link of state.links) noteSpeed(link, state.at)
  const next = JSON.stringify([state.nodes.map(({ id, role }) => [id, role]), state.links.map(({ from, to }) => [from, to])])
  if (next !== shape) {
    shape = next
    build(box, state)
  }
  for (const node of state.nodes) fill(box, node)
  redraw = () => {
    drawLinks(box, state)
    // A region that scrolls must be reached by the keyboard; one that does not is a stop for nothing.
    if (box.scrollHeight > box.clientHeight + 1) box.tabIndex = 0
    else box.removeAttribute('tabindex')
  }
  redraw()
}

addEventListener('resize', () => { redraw() })

function noteSpeed ({ from, to, bytes: moved }, at) {
  const key = `${from} ${to}`
  const last = seen.get(key)
  if (last !== undefined && at > last.at) speeds.set(key, moved > last.moved)
  seen.set(key, { at, moved })
}

function build (box, { nodes, links }) {
  if (nodes.length === 0) {
    box.replaceChildren(el('p', { class: 'empty' }, 'No nodes yet. Engines register by POST /nodes/add.'))
    return
  }
  const columns = COLUMNS.flatMap(([role, title]) => {
    const mine = nodes.filter(node => node.role === role)
    if (mine.length === 0) return []
    return [el('div', { class: 'column', data: { role } }, el('h3', {}, title), ...mine.map(card))]
  })
  box.replaceChildren(
    el('div', { class: 'map' }, svg('svg', { class: 'wires', 'aria-hidden': 'true' }), ...columns),
    el('ul', { class: 'links', aria: { label: 'Links' } }, ...links.map(() => el('li')))
  )
}

function card ({ id, role }) {
  return el('article', { class: 'node', data: { id, role }, aria: { label: `${role} ${nameOf(id)} at ${shortId(id)}` } },
    el('header', {}, el('i', { class: 'dot' }), el('b', {}, nameOf(id)), el('span', { class: 'state' })),
    el('code', { title: id }, shortId(id)),
    el('div', { class: 'load', role: 'img' }, el('i')),
    el('p', { class: 'facts' }), el('p', { class: 'notes' }))
}

function fill (box, node) {
  const at = box.querySelector(`[data-id="${CSS.escape(node.id)}"]`)
  if (at === null) return
  at.dataset.state = node.state
  at.querySelector('.state').textContent = node.state
  const full = FULL_TOKENS[node.role]
  const share = Math.min(1, full === undefined ? node.requests / FULL_CALLS : node.tokens / full)
  const load = at.querySelector('.load')
  load.firstChild.style.inlineSize = `${Math.round(share * 100)}%`
  load.setAttribute('aria-label', `load: ${count(node.requests, 'call')}, ${count(node.tokens, node.role === 'prefill' ? 'prompt token' : 'vision token')}`)
  const facts = [count(node.requests, 'call')]
  if (node.role === 'encoder') facts.push(count(node.tokens, 'token'), count(node.encoded, 'picture'), node.encoded === 0 ? '' : `${percent(node.cached, node.encoded)} cached`)
  else facts.push(node.role === 'prefill' ? count(node.tokens, 'prompt token') : '', node.models.join(', '))
  at.querySelector('.facts').textContent = facts.filter(Boolean).join(' · ')
  const open = Object.entries(node.breakers).map(([stage, breaker]) => `${stage} breaker ${breaker}`)
  at.querySelector('.notes').textContent = [...open, ...node.notes].join('; ')
}

function drawLinks (box, { links, nodes }) {
  const prefills = new Set(nodes.filter(({ role }) => role === 'prefill').map(({ id }) => id))
  const map = box.querySelector('.map')
  if (map === null) return
  const frame = map.getBoundingClientRect()
  const wires = map.querySelector('.wires')
  wires.setAttribute('viewBox', `0 0 ${frame.width} ${frame.height}`)
  wires.dataset.many = String(links.length > LABELLED)
  const places = new Map([...map.querySelectorAll('.node')].map(node => [node.dataset.id, node.getBoundingClientRect()]))
  const drawn = links.flatMap(link => {
    const [from, to] = [places.get(link.from), places.get(link.to)]
    return from === undefined || to === undefined ? [] : wire(link, wares(link, prefills), from, to, frame)
  })
  wires.replaceChildren(...drawn)
  const items = box.querySelectorAll('.links li')
  for (const [i, link] of links.entries()) {
    items[i].textContent = `${nameOf(link.from)} → ${nameOf(link.to)}: ${STATES[link.state] ?? link.state}${link.transport === null ? '' : ` over ${link.transport}`}, ${bytes(link.bytes)}${wares(link, prefills) === 'kv' ? ' of KV blocks' : ''} moved${link.reason === null ? '' : ` (${link.reason})`}`
  }
}

/** What moves over a link. */
function wares ({ from }, prefills) {
  return prefills.has(from) ? 'kv' : 'features'
}

function wire (link, kind, from, to, frame) {
  const x1 = from.right - frame.left
  const y1 = from.top + from.height / 2 - frame.top
  const x2 = to.left - frame.left
  const y2 = to.top + to.height / 2 - frame.top
  const bend = Math.max(24, (x2 - x1) / 2)
  const state = link.state === 'linked' && speeds.get(`${link.from} ${link.to}`) ? 'busy' : link.state
  const label = svg('text', { x: (x1 + x2) / 2, y: (y1 + y2) / 2 - 7, 'text-anchor': 'middle' })
  label.textContent = link.state === 'linked' ? bytes(link.bytes) : STATES[link.state] ?? link.state
  return [
    svg('path', { d: `M${x1},${y1} C${x1 + bend},${y1} ${x2 - bend},${y2} ${x2},${y2}`, class: 'wire', 'data-state': state, 'data-kind': kind }),
    svg('path', { d: `M${x2 - 7},${y2 - 4} L${x2},${y2} L${x2 - 7},${y2 + 4}`, class: 'wire head', 'data-state': state, 'data-kind': kind }),
    label
  ]
}
