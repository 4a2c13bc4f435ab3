import { count, el, ms, named, nameOf, quantile } from './dom.js'

/**
 * The list of requests as a listbox: one Tab stop; arrow, Home, End and Page keys move the selection. Rows are kept by
 * trace id, so a new request at the top does not move the selection.
 */
export class RequestList {
  #box
  #onSelect
  #rows = new Map()
  #order = []
  #compare
  selected

  constructor (box, onSelect) {
    this.#box = box
    this.#onSelect = onSelect
    box.addEventListener('keydown', event => { this.#key(event) })
    box.addEventListener('click', event => {
      const id = event.target.closest('[role=option]')?.dataset.trace
      if (id !== undefined) this.select(id)
    })
  }

  /** @param nothing what to say when there are none */
  show (traces, nothing) {
    const rows = new Map()
    // The scale fits nine of ten requests: one slow request must not shrink all other bars to a dot.
    const longest = Math.max(1, quantile(traces.map(trace => trace.durationMs).sort((a, b) => a - b), 0.9) ?? 1)
    for (const trace of traces) {
      const row = this.#rows.get(trace.traceId) ?? el('li', { role: 'option', id: `r${trace.traceId}`, data: { trace: trace.traceId } })
      const key = `${trace.spans} ${trace.durationMs} ${trace.status} ${trace.failures.length} ${Math.round(200 * trace.durationMs / longest)}`
      if (row.dataset.key !== key) fill(row, trace, longest)
      row.dataset.key = key
      row.setAttribute('aria-selected', String(trace.traceId === this.selected))
      rows.set(trace.traceId, row)
    }
    this.#rows = rows
    if (rows.has(this.selected)) this.#box.setAttribute('aria-activedescendant', `r${this.selected}`)
    else this.#box.removeAttribute('aria-activedescendant')
    this.#order = traces.map(trace => trace.traceId)
    if (traces.length === 0) this.#box.replaceChildren(el('li', { class: 'empty' }, nothing))
    else this.#place([...rows.values()])
  }

  /** Moves only rows that changed place, so that the browser keeps scroll position and hover. */
  #place (rows) {
    const wanted = new Set(rows)
    for (const child of [...this.#box.children]) if (!wanted.has(child)) child.remove()
    for (const [i, row] of rows.entries()) if (this.#box.children[i] !== row) this.#box.insertBefore(row, this.#box.children[i] ?? null)
  }

  /** The user has chosen it. */
  select (id, { scroll = false } = {}) {
    this.mark(id)
    if (scroll) this.#rows.get(id)?.scrollIntoView({ block: 'nearest' })
    this.#onSelect(id)
  }

  /** Shows it as the selected one; it may not be in the list. @param compare the one it is compared with */
  mark (id, compare = this.#compare) {
    this.selected = id
    this.#compare = compare
    for (const [trace, row] of this.#rows) {
      row.setAttribute('aria-selected', String(trace === id))
      row.classList.toggle('compared', trace === compare && trace !== id)
    }
    if (this.#rows.has(id)) this.#box.setAttribute('aria-activedescendant', `r${id}`)
    else this.#box.removeAttribute('aria-activedescendant')
  }

  #key (event) {
    const at = this.#order.indexOf(this.selected)
    const last = this.#order.length - 1
    const moves = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: last, PageDown: at + 10, PageUp: at - 10 }
    if (!(event.key in moves) || last < 0) return
    event.preventDefault()
    this.select(this.#order[Math.max(0, Math.min(last, moves[event.key]))], { scroll: true })
  }
}

function fill (row, trace, longest) {
  const { plan, status, partial, encoders, inputTokens, outputTokens, durationMs, start, name, retries } = trace
  const state = partial ? 'partial' : status
  const where = encoders.length === 0 ? '' : `encoded by ${[...new Set(encoders)].map(nameOf).join(', ')}`
  const why = failureLine(trace)
  row.dataset.status = state
  row.replaceChildren(
    el('time', { datetime: start, title: start }, clock(start)),
    el('span', { class: 'plan', data: { plan: plan ?? 'none' } }, partial ? 'running' : plan ?? 'none'),
    el('span', { class: 'media', title: where }, media(trace), encoders.length === 0 ? '' : el('small', {}, ` ${[...new Set(encoders)].map(nameOf).join(' ')}`)),
    el('span', { class: 'tokens' }, inputTokens === undefined && outputTokens === undefined ? '–' : `${inputTokens ?? '?'} → ${outputTokens ?? '?'}`),
    el('span', { class: 'took' }, el('i', { style: { 'inline-size': `${Math.min(100, Math.max(1, 100 * durationMs / longest)).toFixed(1)}%` } }), el('b', {}, ms(durationMs))),
    el('span', { class: 'mark' }, state === 'ok' || state === 'partial' ? (retries > 0 ? 'retried' : '') : state),
    why === '' ? '' : el('span', { class: 'reason', title: why }, why)
  )
  row.setAttribute('aria-label', [name, plan ?? 'no plan', state, media(trace), ms(durationMs), why].filter(Boolean).join(', '))
}

/** Why it failed, and where; of a request that went well, what had failed before. */
function failureLine ({ error, failures }) {
  const last = failures.at(-1)
  const where = last === undefined ? '' : `${last.stage} on ${nameOf(last.node)}, attempt ${last.attempt}`
  const why = last === undefined ? '' : named(last.message)
  if (error !== undefined) return [error.code, where, why || named(error.message)].filter(Boolean).join(' · ')
  return last === undefined ? '' : `${where}: ${last.code} · ${why}`
}

/** A running request has no figures yet. */
function media ({ partial, items }) {
  if (items > 0) return count(items, 'image')
  return partial ? '–' : 'text'
}

function clock (iso) {
  return new Date(iso).toLocaleTimeString('en-GB', { hour12: false }) + iso.slice(19, 21)
}
