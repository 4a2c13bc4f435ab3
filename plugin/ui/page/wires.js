import { bytes, nameOf, svg } from './dom.js'

/** Lanes below the cards for links that skip a column; further links share the last lane. */
export const LANES = 6
const LANE_PX = 13
const STATES = { linked: 'linked', linking: 'linking', failed: 'failed', refused: 'refused', none: 'not linked' }

/** By link: does something move over it? And what had moved when it was last looked at. */
let speeds = new Map()
let seen = new Map()

/** To be called with each state, in time order. */
export function noteSpeeds ({ links, at }) {
  const [before, were] = [seen, speeds]
  seen = new Map()
  speeds = new Map()
  for (const { from, to, bytes: moved } of links) {
    const key = `${from} ${to}`
    const last = before.get(key)
    if (last === undefined || at > last.at) {
      speeds.set(key, last !== undefined && moved > last.moved)
      seen.set(key, { at, moved })
    } else {
      speeds.set(key, were.get(key) === true)
      seen.set(key, last)
    }
  }
}

/** The links of a small map as wires between its cards. */
export function drawLinks (box, { links, nodes }) {
  const prefills = new Set(nodes.filter(({ role }) => role === 'prefill').map(({ id }) => id))
  const map = box.querySelector('.map')
  if (map === null) return
  const frame = map.getBoundingClientRect()
  const wires = map.querySelector('.wires')
  wires.setAttribute('viewBox', `0 0 ${frame.width} ${frame.height}`)
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
  for (const [i, link] of links.entries()) items[i].textContent = inWords(link, wares(link, prefills))
}

/** A link as a sentence, for those who do not see the wires. */
export function inWords ({ from, to, state, transport, bytes: moved, reason }, kind = 'features') {
  return `${nameOf(from)} → ${nameOf(to)}: ${STATES[state] ?? state}${transport === null ? '' : ` over ${transport}`}, ${bytes(moved)}${kind === 'kv' ? ' of KV blocks' : ''} moved${reason === null ? '' : ` (${reason})`}`
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
