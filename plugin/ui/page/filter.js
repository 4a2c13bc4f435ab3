/* global Option */
import { onAddress, readAddress, writeAddress } from './address.js'
import { idOf } from './dom.js'

const FIELDS = ['search', 'plan', 'status', 'model', 'min']

/** The form above the list of requests. What is chosen stands in the address. */
export class Filter {
  #form

  /** @param onChange called when the user has changed something */
  constructor (form, onChange) {
    this.#form = form
    this.#fill()
    onAddress(() => { this.#fill() })
    form.addEventListener('input', () => {
      writeAddress(Object.fromEntries(FIELDS.map(name => [name, form.elements[name].value.trim()])))
      onChange()
    })
    form.addEventListener('submit', event => { event.preventDefault() })
  }

  /** The models to choose from; the one that is chosen may have left. */
  offer (models) {
    const select = this.#form.elements.model
    const { model } = readAddress()
    const offered = model === undefined || models.includes(model) ? models : [...models, model]
    if ([...select.options].slice(1).map(option => option.value).join('\n') === offered.join('\n')) return
    select.replaceChildren(select.options[0], ...offered.map(one => new Option(one, one)))
    select.value = model ?? ''
  }

  /** The query for `GET traces`; undefined when nothing is filtered. */
  query () {
    const { search, plan, status, model, min } = readAddress()
    const query = new URLSearchParams(Object.entries({ plan, status, model, min_duration_ms: Number(min) > 0 ? min : undefined }).filter(([, value]) => value !== undefined))
    // A node's short name, E1, is this page's: the gateway knows addresses.
    if (search !== undefined) query.set('search', search.split(/\s+/).map(word => idOf(word) ?? word).join(' '))
    return query.size === 0 ? undefined : query
  }

  #fill () {
    const values = readAddress()
    for (const name of FIELDS) {
      const field = this.#form.elements[name]
      const value = values[name] ?? ''
      if (field.value.trim() === value) continue
      // A model that is not offered yet.
      if (name === 'model' && ![...field.options].some(option => option.value === value)) field.append(new Option(value, value))
      field.value = value
    }
  }
}
