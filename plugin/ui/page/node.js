/* global CSS */
import { addressWith, onAddress, readAddress, writeAddress } from './address.js'
import { bytes, count, el, named, nameOf, percent, shortId } from './dom.js'

/** Stages a role takes part in: the others' breakers say nothing. */
const STAGES = { encoder: ['encode'], prefill: ['prefill'], decode: ['decode'], hybrid: ['encode', 'prefill', 'decode'] }
const LINKS = { linked: 'linked', linking: 'linking', failed: 'failed', refused: 'refused', none: 'not linked' }

/** One node in a dialog: what it does, what ails it, and the buttons that take it out of use and back. */
export class NodeView {
  #dialog
  #state
  #shown = ''
  #asked = 0
  /** The admin key, once it was asked for; forgotten with the page. */
  #key

  constructor (dialog) {
    this.#dialog = dialog
    dialog.querySelector('[name=close]').addEventListener('click', () => { dialog.close() })
    dialog.addEventListener('close', () => { writeAddress({ node: undefined }) })
    // A click beside the dialog's content is one on its backdrop.
    dialog.addEventListener('click', event => { if (event.target === dialog) dialog.close() })
    dialog.querySelector('[name=drain]').addEventListener('click', event => { this.#drain(event.currentTarget.value === 'drain').catch(() => { this.#say('The gateway could not be asked.') }) })
    dialog.querySelector('form').addEventListener('submit', event => {
      event.preventDefault()
      const field = event.currentTarget.elements.key
      this.#key = field.value
      field.value = ''
      event.currentTarget.hidden = true
      this.#drain(event.currentTarget.dataset.on === 'true').catch(() => { this.#say('The gateway could not be asked.') })
    })
    dialog.addEventListener('click', event => {
      const link = event.target.closest('a')
      if (link === null || event.ctrlKey || event.metaKey) return
      // A request is shown on the page below; another node, in the same dialog.
      if (!link.hash.includes('node=')) dialog.close()
    })
    onAddress(() => { this.update(this.#state).catch(() => {}) })
  }

  async update (state) {
    if (state === undefined) return
    this.#state = state
    const { node: id } = readAddress()
    if (id === undefined) {
      if (this.#dialog.open) this.#dialog.close()
      return
    }
    const turn = ++this.#asked
    const answer = await fetch(`node?id=${encodeURIComponent(id)}`)
    const detail = answer.ok ? await answer.json() : undefined
    if (turn !== this.#asked || readAddress().node !== id) return
    if (detail === undefined && answer.status !== 404) return
    this.#show(id, state.nodes.find(node => node.id === id), detail)
  }

  #show (id, node, detail) {
    const dialog = this.#dialog
    if (dialog.dataset.node !== id) {
      dialog.dataset.node = id
      dialog.querySelector('form').hidden = true
      this.#say('')
    }
    const key = JSON.stringify([id, node, detail])
    if (key !== this.#shown) {
      this.#shown = key
      head(dialog, id, node, detail)
      const focused = document.activeElement?.dataset?.key
      dialog.querySelector('.body').replaceChildren(...node === undefined || detail === undefined ? [el('p', { class: 'empty' }, 'No such node here: it was taken out, or never registered.')] : body(node, detail))
      if (focused !== undefined) dialog.querySelector(`[data-key="${CSS.escape(focused)}"]`)?.focus()
    }
    if (!dialog.open) dialog.showModal()
  }

  async #drain (on) {
    const { node } = this.#dialog.dataset
    const headers = { 'content-type': 'application/json', ...this.#key === undefined ? {} : { authorization: `Bearer ${this.#key}` } }
    const answer = await fetch(`../nodes/${on ? 'drain' : 'undrain'}`, { method: 'POST', headers, body: JSON.stringify({ url: node }) })
    if (answer.status === 401 || answer.status === 403) return this.#askKey(on)
    const { error } = await answer.json().catch(() => ({}))
    this.#say(answer.ok ? (on ? 'It gets no further requests; those in flight end.' : 'It gets requests again.') : error?.message ?? `The gateway answered ${answer.status}.`)
    await this.update(this.#state)
  }

  #askKey (on) {
    const form = this.#dialog.querySelector('form')
    this.#say(this.#key === undefined ? 'This needs the admin key.' : 'That is not the admin key.')
    this.#key = undefined
    form.dataset.on = String(on)
    form.hidden = false
    form.elements.key.focus()
  }

  #say (text) {
    this.#dialog.querySelector('[role=status]').textContent = text
  }
}

function head (dialog, id, node, detail) {
  dialog.querySelector('h2').replaceChildren(node === undefined ? shortId(id) : nameOf(id), ' ', el('small', {}, node?.role ?? ''))
  const pill = dialog.querySelector('.pill')
  pill.hidden = detail === undefined
  pill.textContent = detail?.state ?? ''
  pill.dataset.state = { healthy: 'ok', unhealthy: 'error' }[detail?.state] ?? 'running'
  const button = dialog.querySelector('[name=drain]')
  button.hidden = detail === undefined
  button.value = detail?.drained ? 'undrain' : 'drain'
  button.textContent = detail?.drained ? 'Take back into use' : 'Drain'
}

function body (node, detail) {
  return [
    el('p', { class: 'id' }, el('code', {}, node.id), ' ', el('a', { href: addressWith({ node: undefined, search: shortId(node.id) }), data: { key: 'requests' } }, 'its requests')),
    node.notes.length === 0 ? '' : el('ul', { class: 'notes' }, ...node.notes.map(note => el('li', {}, note))),
    section('Use', el('dl', { class: 'pairs' }, ...uses(node, detail).flatMap(([name, value, share]) => pair(name, value, share)))),
    section('Circuit breakers', el('ul', { class: 'breakers' }, ...(STAGES[node.role] ?? []).map(stage => el('li', { data: { breaker: detail.breakers[stage] } }, stage, ' ', el('b', {}, detail.breakers[stage]))))),
    section('Links', links(node, detail.links)),
    section('Last errors', errors(detail.errors)),
    section('Server', el('dl', { class: 'pairs' }, ...server(node, detail).flatMap(([name, value]) => pair(name, value))))
  ].filter(one => one !== '')
}

function section (title, ...content) {
  return el('section', {}, el('h3', {}, title), ...content)
}

function pair (name, value, share) {
  return [el('div', {}, el('dt', {}, name), el('dd', {}, ...share === undefined ? [] : [el('i', { class: 'meter', style: { '--share': `${Math.round(100 * share)}%` } })], value))]
}

function uses (node, { active, work, rate }) {
  const { gauges } = node
  const tokens = { encoder: 'vision tokens', prefill: 'prompt tokens' }[node.role] ?? 'vision tokens'
  return [
    ['calls of this gateway', active === node.requests ? String(node.requests) : `${active}, ${node.requests - active} more planned`],
    [`${tokens} in flight`, node.tokens.toLocaleString('en')],
    ['estimated work', count(work.toLocaleString('en'), 'token')],
    ['measured rate', rate === null ? undefined : `${rate.toLocaleString('en')} vision tokens/s`],
    ['pictures', node.encoded === 0 ? undefined : `${node.encoded.toLocaleString('en')}, ${percent(node.cached, node.encoded)} cached`],
    ['running, as it says', gauges?.running?.toLocaleString('en')],
    ['waiting, as it says', gauges?.waiting?.toLocaleString('en')],
    ['KV cache in use', ...share(gauges?.kv)],
    ['feature cache filled', ...share(gauges?.features)]
  ].filter(([, value]) => value !== undefined)
}

function share (value) {
  return value === undefined ? [undefined] : [percent(value, 1), value]
}

function server (node, { adapter, version, vision, speed }) {
  return [['backend', node.backend ?? undefined], ['version', version ?? undefined], ['adapter', adapter], ['models', node.models.join(', ') || undefined], ['vision', vision ?? undefined], ['speed', speed === 1 ? undefined : String(speed)]].filter(([, value]) => value !== undefined)
}

function links ({ id }, all) {
  if (all.length === 0) return el('p', { class: 'empty' }, 'It has none.')
  return el('ul', { class: 'rows' }, ...all.map(({ from, to, state, transport, reason, bytes: moved }) => {
    const other = from === id ? to : from
    return el('li', { data: { link: state } }, el('span', {}, from === id ? 'to ' : 'from ', el('a', { href: addressWith({ node: other }), data: { key: other } }, nameOf(other))),
      el('span', {}, `${LINKS[state] ?? state}${transport === null ? '' : ` over ${transport}`}`), el('span', {}, moved === 0 ? '' : bytes(moved)), el('span', { class: 'cause' }, reason ?? ''))
  }))
}

function errors (all) {
  if (all.length === 0) return el('p', { class: 'empty' }, 'None since the gateway began, in traced requests.')
  return el('ol', { class: 'rows' }, ...all.map(({ at, traceId, span, code, message }, i) => el('li', {},
    el('a', { href: addressWith({ node: undefined, compare: undefined, trace: traceId }), data: { key: `error ${i}` } }, new Date(at).toLocaleTimeString('en-GB', { hour12: false })),
    el('span', {}, span), el('b', {}, code), el('span', { class: 'cause' }, named(message)))))
}
