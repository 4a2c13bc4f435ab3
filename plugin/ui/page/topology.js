/* global addEventListener, dispatchEvent, HashChangeEvent */
import { addressWith, writeAddress } from './address.js'
import { bytes, count, el, named, nameNodes, nameOf, percent, shortId, svg } from './dom.js'
import { drawLinks, inWords, LANES, noteSpeeds } from './wires.js'

const COLUMNS = [['encoder', 'Encode'], ['prefill', 'Prefill'], ['decode', 'Decode'], ['hybrid', 'Prefill + decode']]
/** Load that fills a node's bar: vision tokens of encoders, prompt tokens of prefill nodes, else calls. */
const FULL_TOKENS = { encoder: 4_096, prefill: 16_384 }
const FULL_CALLS = 16
/** More nodes or links than this make a dense map: tiles in place of cards, links in words in place of wires. */
const [MANY_NODES, MANY_LINKS] = [16, 40]
/** Links that a dense map names, because something is wrong with them. */
const NAMED = 12

let shape = ''
let redraw = () => {}
/** Of the dense map: how each node is linked to the others. */
let peers = new Map()

/** Nodes in columns by role, and the links over which features and KV blocks move. Rebuilt when nodes come and go; otherwise only the numbers change. */
export function showTopology (box, state) {
  nameNodes(state.nodes)
  noteSpeeds(state)
  const next = JSON.stringify([state.nodes.map(({ id, role }) => [id, role]), state.links.map(({ from, to }) => [from, to])])
  if (next !== shape) {
    shape = next
    build(box, state)
  }
  const cards = new Map([...box.querySelectorAll('.node')].map(one => [one.dataset.id, one]))
  for (const node of state.nodes) fill(cards.get(node.id), node)
  const dense = isDense(state)
  if (dense) summarise(box, state)
  redraw = () => {
    if (!dense) drawLinks(box, state)
    // A region that scrolls must be a Tab stop; one that does not must not be.
    if (box.scrollHeight > box.clientHeight + 1) box.tabIndex = 0
    else box.removeAttribute('tabindex')
  }
  redraw()
}

addEventListener('resize', () => { redraw() })

function build (box, { nodes, links }) {
  if (nodes.length === 0) {
    box.replaceChildren(el('p', { class: 'empty' }, 'No nodes yet. Engines register by POST /nodes/add.'))
    return
  }
  const columns = COLUMNS.map(([role, title]) => [title, role, nodes.filter(node => node.role === role)]).filter(([, , mine]) => mine.length > 0)
  if (isDense({ nodes, links })) return buildDense(box, columns)
  const at = new Map(columns.flatMap(([, , mine], i) => mine.map(({ id }) => [id, i])))
  const passing = links.filter(({ from, to }) => at.get(to) - at.get(from) > 1).length
  box.replaceChildren(
    el('div', { class: 'map', style: { '--lanes': String(Math.min(passing, LANES)) } }, svg('svg', { class: 'wires', 'aria-hidden': 'true' }),
      ...columns.map(([title, role, mine]) => el('div', { class: 'column', data: { role } }, el('h3', {}, title), ...mine.map(card)))),
    el('ul', { class: 'links', aria: { label: 'Links' } }, ...links.map(() => el('li')))
  )
}

function isDense ({ nodes, links }) {
  return nodes.length > MANY_NODES || links.length > MANY_LINKS
}

/** Tiles; those that are linked to the one under the pointer, or in focus, stand out. */
function buildDense (box, columns) {
  const map = el('div', { class: 'map', data: { dense: 'true' } }, ...columns.map(([title, role, mine]) =>
    el('div', { class: 'column', data: { role }, style: { '--share': String(mine.length) } }, el('h3', {}, title, ' ', el('small')), el('div', { class: 'tiles' }, ...mine.map(card)))))
  const look = event => { mark(map, event.target.closest('.node')?.dataset.id) }
  for (const type of ['pointerover', 'focusin']) map.addEventListener(type, look)
  for (const type of ['pointerleave', 'focusout']) map.addEventListener(type, () => { mark(map, undefined) })
  box.replaceChildren(map, el('ul', { class: 'links named', aria: { label: 'Links' } }))
}

function mark (map, id) {
  map.classList.toggle('looking', id !== undefined)
  for (const node of map.querySelectorAll('.node')) {
    const state = id === undefined ? undefined : node.dataset.id === id ? 'self' : peers.get(id)?.get(node.dataset.id)
    if (state === undefined) delete node.dataset.peer
    else node.dataset.peer = state
  }
}

/** The links with which something is wrong; those of one node that share the reason, together. */
function wrongOf (links) {
  const groups = new Map()
  for (const link of links) {
    if (link.state !== 'failed' && link.state !== 'refused') continue
    const key = JSON.stringify([link.from, link.state, link.reason])
    groups.set(key, [...groups.get(key) ?? [], link])
  }
  return [...groups.values()].map(group => group.length === 1 ? inWords(group[0]) : `${nameOf(group[0].from)} → ${group.length} nodes: ${group[0].state}${group[0].reason === null ? '' : ` (${named(group[0].reason)})`}`)
}

/** Of each pair of columns how many links there are, and those with which something is wrong. */
function summarise (box, { nodes, links }) {
  const roles = new Map(nodes.map(({ id, role }) => [id, role]))
  peers = new Map(nodes.map(({ id }) => [id, new Map()]))
  const pairs = new Map()
  for (const { from, to, state, bytes: moved } of links) {
    peers.get(from)?.set(to, state)
    peers.get(to)?.set(from, state)
    const key = `${roles.get(from)} ${roles.get(to)}`
    const pair = pairs.get(key) ?? { from: roles.get(from), to: roles.get(to), all: 0, linked: 0, moved: 0 }
    pairs.set(key, pair)
    pair.all++
    if (state === 'linked') pair.linked++
    pair.moved += moved
  }
  const titles = new Map(COLUMNS)
  const wrong = wrongOf(links)
  const lines = [
    ...[...pairs.values()].map(({ from, to, all, linked, moved }) => [`${titles.get(from) ?? from} → ${titles.get(to) ?? to}: ${linked} of ${count(all, 'link')}, ${bytes(moved)} moved`, true]),
    ...wrong.slice(0, NAMED).map(text => [text, false]),
    ...wrong.length > NAMED ? [[`and ${wrong.length - NAMED} more`, false]] : []
  ]
  box.querySelector('.links').replaceChildren(...lines.map(([text, well]) => el('li', { class: well ? '' : 'wrong' }, text)))
  for (const column of box.querySelectorAll('.column')) {
    const mine = nodes.filter(({ role }) => role === column.dataset.role)
    column.querySelector('small').textContent = `${mine.filter(({ state }) => state === 'healthy').length} of ${mine.length} healthy`
  }
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

function fill (at, node) {
  if (at === undefined) return
  at.dataset.state = node.state
  at.classList.toggle('ailing', Object.keys(node.breakers).length > 0)
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
  // A tile has room for two words.
  const tile = at.closest('.tiles') !== null
  at.querySelector('.gauges').replaceChildren(...gauges(node.gauges, tile))
  const noun = tile ? '' : ' breaker'
  const open = Object.entries(node.breakers).map(([stage, breaker]) => `${stage}${noun} ${breaker}`)
  at.querySelector('.notes').textContent = [...open, ...node.notes.map(named)].join('; ')
  at.querySelector('.notes').title = node.notes.join('; ')
}

/** What the node says of itself, where it does. */
function gauges (all, tile) {
  const { waiting, kv, features } = all ?? {}
  return [
    ...waiting === undefined || (tile && waiting === 0) ? [] : [el('span', {}, `${waiting} waiting`)],
    ...[['KV', kv], ['features', features]].flatMap(([name, share]) => share === undefined ? [] : [el('span', {}, `${name} `, el('i', { class: 'meter', style: { '--share': `${Math.round(100 * share)}%` } }), ` ${percent(share, 1)}`)])
  ]
}
