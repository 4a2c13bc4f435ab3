/* global addEventListener, CSS, dispatchEvent, HashChangeEvent */
import { addressWith, writeAddress } from './address.js'
import { bytes, count, el, nameNodes, nameOf, percent, shortId, svg } from './dom.js'

const COLUMNS = [['encoder', 'Encode'], ['prefill', 'Prefill'], ['decode', 'Decode'], ['hybrid', 'Prefill + decode']]
/** Load that fills a node's bar: vision tokens of encoders, prompt tokens of prefill nodes, else calls. */
const FULL_TOKENS = { encoder: 4_096, prefill: 16_384 }
const FULL_CALLS = 16
/** Most links for which the map has labels. */
const LABELLED = 40
/** Lanes below the cards for links that skip a column; further links share the last lane. */
const LANES = 6
const LANE_PX = 13
const STATES = { linked: 'linked', linking: 'linking', failed: 'failed', refused: 'refused', none: 'not linked' }

let shape = ''
let redraw = () => {}
const speeds = new Map()
const seen = new Map()

/** Nodes in columns by role, and the links over which features and KV blocks move. Rebuilt when nodes come and go; otherwise only the numbers change. */
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
    // A region that scrolls must be a Tab stop; one that does not must not be.
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
  const columns = COLUMNS.map(([role, title]) => [title, role, nodes.filter(node => node.role === role)]).filter(([, , mine]) => mine.length > 0)
  const at = new Map(columns.flatMap(([, , mine], i) => mine.map(({ id }) => [id, i])))
  const passing = links.filter(({ from, to }) => at.get(to) - at.get(from) > 1).length
  box.replaceChildren(
    el('div', { class: 'map', style: { '--lanes': String(Math.min(passing, LANES)) } }, svg('svg', { class: 'wires', 'aria-hidden': 'true' }),
      ...columns.map(([title, role, mine]) => el('div', { class: 'column', data: { role } }, el('h3', {}, title), ...mine.map(card)))),
    el('ul', { class: 'links', aria: { label: 'Links' } }, ...links.map(() => el('li')))
  )
}

function card ({ id, role }) {
  return el('article', { class: 'node', data: { id, role }, aria: { label: `${role} ${nameOf(id)} at ${shortId(id)}` } },
    el('header', {}, el('i', { class: 'dot' }), el('b', {}, link(id)), el('span', { class: 'state' })),
    el('code', { title: id }, shortId(id)),
    el('div', { class: 'load', role: 'img' }, el('i')),
    el('p', { class: 'facts' }), el('p', { class: 'gauges' }), el('p', { class: 'notes' }))
}

/** Opens the view of the node. */
function link (id) {
  const open = event => {
    if (event.ctrlKey || event.metaKey || event.shiftKey) return
    event.preventDefault()
    writeAddress({ node: id }, { step: true })
    dispatchEvent(new HashChangeEvent('hashchange'))
  }
  return el('a', { href: addressWith({ node: id }), on: { click: open } }, nameOf(id))
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
  at.querySelector('.gauges').replaceChildren(...gauges(node.gauges))
  const open = Object.entries(node.breakers).map(([stage, breaker]) => `${stage} breaker ${breaker}`)
  at.querySelector('.notes').textContent = [...open, ...node.notes].join('; ')
}

/** What the node says of itself, where it does. */
function gauges (all) {
  const { waiting, kv, features } = all ?? {}
  return [
    ...waiting === undefined ? [] : [el('span', {}, `${waiting} waiting`)],
    ...[['KV', kv], ['features', features]].flatMap(([name, share]) => share === undefined ? [] : [el('span', {}, `${name} `, el('i', { class: 'meter', style: { '--share': `${Math.round(100 * share)}%` } }), ` ${percent(share, 1)}`)])
  ]
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
  let lanes = 0
  const drawn = links.flatMap(link => {
    const [from, to] = [places.get(link.from), places.get(link.to)]
    if (from === undefined || to === undefined) return []
    const between = [...places.values()].filter(place => place.left > from.right && place.right < to.left)
    const way = between.length === 0 ? straight(from, to, frame) : around(between, Math.min(lanes++, LANES - 1), from, to, frame)
    return wire(link, wares(link, prefills), way)
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

/** A link from one card's right edge to another's left edge: its end, its path, and its label's place. */
function straight (from, to, frame) {
  const [x1, y1, x2, y2] = ends(from, to, frame)
  const bend = Math.max(24, (x2 - x1) / 2)
  return { x2, y2, path: `M${x1},${y1} C${x1 + bend},${y1} ${x2 - bend},${y2} ${x2},${y2}`, label: [(x1 + x2) / 2, (y1 + y2) / 2 - 7] }
}

/** A link below the cards in between: behind a card it would look like two links. */
function around (between, lane, from, to, frame) {
  const [x1, y1, x2, y2] = ends(from, to, frame)
  const left = Math.min(...between.map(place => place.left)) - frame.left
  const right = Math.max(...between.map(place => place.right)) - frame.left
  const y = Math.max(...between.map(place => place.bottom)) - frame.top + (lane + 0.8) * LANE_PX
  const path = `M${x1},${y1} C${(x1 + left) / 2},${y1} ${(x1 + left) / 2},${y} ${left},${y} H${right} C${(right + x2) / 2},${y} ${(right + x2) / 2},${y2} ${x2},${y2}`
  return { x2, y2, path, label: [(left + right) / 2, y + 4] }
}

function ends (from, to, frame) {
  return [from.right - frame.left, from.top + from.height / 2 - frame.top, to.left - frame.left, to.top + to.height / 2 - frame.top]
}

function wire (link, kind, { x2, y2, path, label: [x, y] }) {
  const state = link.state === 'linked' && speeds.get(`${link.from} ${link.to}`) ? 'busy' : link.state
  const label = svg('text', { x, y, 'text-anchor': 'middle' })
  label.textContent = link.state === 'linked' ? bytes(link.bytes) : STATES[link.state] ?? link.state
  return [
    svg('path', { d: path, class: 'wire', 'data-state': state, 'data-kind': kind }),
    svg('path', { d: `M${x2 - 7},${y2 - 4} L${x2},${y2} L${x2 - 7},${y2 + 4}`, class: 'wire head', 'data-state': state, 'data-kind': kind }),
    label
  ]
}
