/** An element with properties, classes and children. Strings become text nodes, never markup. */
export function el (tag, options = {}, ...children) {
  const { class: className, data, aria, style, on, ...rest } = options
  const element = document.createElement(tag)
  if (className) element.className = className
  for (const [name, value] of Object.entries(data ?? {})) element.dataset[name] = value
  for (const [name, value] of Object.entries(aria ?? {})) element.setAttribute(`aria-${name}`, value)
  for (const [name, value] of Object.entries(style ?? {})) element.style.setProperty(name, value)
  for (const [name, listener] of Object.entries(on ?? {})) element.addEventListener(name, listener)
  for (const [name, value] of Object.entries(rest)) if (value !== undefined) element.setAttribute(name, value)
  element.append(...children.filter(child => child !== undefined && child !== null && child !== ''))
  return element
}

export function svg (tag, attributes = {}, ...children) {
  const element = document.createElementNS('http://www.w3.org/2000/svg', tag)
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value)
  element.append(...children)
  return element
}

export function ms (value) {
  if (value >= 10_000) return `${(value / 1_000).toFixed(1)} s`
  if (value >= 1_000) return `${(value / 1_000).toFixed(2)} s`
  if (value >= 100) return `${value.toFixed(0)} ms`
  return `${value.toFixed(value >= 10 ? 1 : 2)} ms`
}

export function bytes (value) {
  if (value >= 1 << 30) return `${(value / (1 << 30)).toFixed(1)} GiB`
  if (value >= 1 << 20) return `${(value / (1 << 20)).toFixed(1)} MiB`
  if (value >= 1 << 10) return `${(value / (1 << 10)).toFixed(1)} KiB`
  return `${value} B`
}

export function percent (part, whole) {
  return whole === 0 ? '–' : `${Math.round(100 * part / whole)} %`
}

export function count (value, noun) {
  return `${value} ${noun}${value === 1 ? '' : 's'}`
}

/** An engine id, shortened for people. */
export function shortId (id) {
  return id.replace(/^https?:\/\//, '').replace(/\/$/, '')
}

const LETTERS = { encoder: 'E', prefill: 'P', decode: 'D', hybrid: 'PD' }
const names = new Map()
const counts = new Map()

/** Gives each node a short name, E1 or PD2, which it keeps while the page is open. */
export function nameNodes (nodes) {
  for (const { id, role } of nodes) {
    if (names.has(id)) continue
    const number = (counts.get(role) ?? 0) + 1
    counts.set(role, number)
    names.set(id, `${LETTERS[role] ?? 'N'}${number}`)
  }
}

export function nameOf (id) {
  return names.get(id) ?? shortId(String(id))
}

/** The node that the page calls by this name, in any case; undefined when there is none. */
export function idOf (name) {
  for (const [id, one] of names) if (one.toLowerCase() === name.toLowerCase()) return id
  return undefined
}

/** A message in which the addresses of nodes are their short names. */
export function named (message) {
  if (typeof message !== 'string') return message
  // Long ones first: one address may be the beginning of another.
  return [...names].sort(([one], [other]) => other.length - one.length).reduce((text, [id, name]) => text.replaceAll(id, name), message)
}

export function quantile (sorted, q) {
  if (sorted.length === 0) return undefined
  return sorted[Math.min(sorted.length - 1, Math.floor(sorted.length * q))]
}
