/* global addEventListener, history, location */
/**
 * What the page shows, in the address behind #: a link brings back the request, the comparison, the node, the filter and
 * the time range that were on the screen. Anything may stand there, so each value is checked.
 */
const TRACE = /^[0-9a-f]{32}$/i
const CHECKS = {
  trace: value => TRACE.test(value),
  compare: value => TRACE.test(value),
  node: value => value.length <= 2_048,
  search: value => value.length <= 256,
  plan: value => value.length <= 32,
  status: value => value.length <= 32,
  model: value => value.length <= 256,
  min: value => Number(value) >= 0 && Number(value) < 1e9,
  range: value => value === '1h'
}

/** The values that are there and make sense. */
export function readAddress () {
  const params = new URLSearchParams(location.hash.slice(1))
  return Object.fromEntries(Object.entries(CHECKS).flatMap(([name, check]) => {
    const value = params.get(name)
    return value !== null && value !== '' && check(value) ? [[name, value]] : []
  }))
}

/** The address with these values; an empty one, or undefined, is left out. For links. */
export function addressWith (changes) {
  const values = { ...readAddress(), ...changes }
  const params = new URLSearchParams(Object.keys(CHECKS).flatMap(name => values[name] ? [[name, values[name]]] : []))
  return `#${params}`
}

/** @param step whether the browser's Back button returns to what was there before */
export function writeAddress (changes, { step = false } = {}) {
  const hash = addressWith(changes)
  if (hash === (location.hash || '#')) return
  const address = hash === '#' ? location.pathname + location.search : hash
  if (step) history.pushState(null, '', address)
  else history.replaceState(null, '', address)
}

/** Calls the listener when someone follows a link in the page, goes back, or types an address. */
export function onAddress (listener) {
  addEventListener('hashchange', listener)
}
