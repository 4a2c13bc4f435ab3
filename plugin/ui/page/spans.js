import { bytes, count, el, ms, named, nameOf } from './dom.js'

const ROLE_OF = [
  ['engine.migrate', 'migrate'], ['engine.ahead', 'migrate'], ['engine.preprocess', 'encode'], ['engine.encode', 'encode'], ['epd.encode', 'encode'],
  ['engine.prepare', 'prefill'], ['engine.prefill', 'prefill'], ['epd.prefill', 'prefill'], ['engine.decode', 'decode'], ['epd.decode', 'decode'], ['epd.plan', 'plan']
]
/** Attributes shown beside a bar, in this order. Spans come from any engine, so a value may have any type. */
const FACTS = [
  ['epd.topology', value => value],
  ['epd.node', nameOf],
  ['epd.peer', value => `from ${String(value).split(',').map(nameOf).join(', ')}`],
  ['epd.items', value => count(value, 'item')],
  ['epd.tokens', value => count(value, 'token')],
  ['gen_ai.usage.input_tokens', value => `${value} in`],
  ['gen_ai.usage.output_tokens', value => `${value} out`],
  ['epd.cached', value => value === true ? 'cached' : value > 0 ? `${value} cached` : ''],
  ['epd.ahead', value => value > 0 ? `${value} ahead` : ''],
  ['epd.bytes', value => value > 0 ? bytes(value) : ''],
  ['epd.link', value => value],
  ['epd.batch', value => value > 1 ? `batch ${value}` : ''],
  ['epd.queue_ms', value => value >= 0.5 ? `waited ${ms(Number(value))}` : ''],
  ['epd.retries', value => value > 0 ? `${value} retried` : '']
]

/** The colour of a span's bar. */
export function roleOf (span) {
  return ROLE_OF.find(([prefix]) => span.name.startsWith(prefix))?.[1] ?? 'request'
}

export function legend () {
  return el('p', { class: 'legend', aria: { hidden: 'true' } }, ...['plan', 'encode', 'migrate', 'prefill', 'decode'].map(role => el('span', { data: { role } }, role)))
}

/** From where to where a trace's spans reach, in milliseconds. */
export function extentOf ({ spans }) {
  const zero = Math.min(...spans.map(span => span.offsetMs))
  return { zero, total: Math.max(0.001, Math.max(...spans.map(span => span.offsetMs + span.durationMs)) - zero) }
}

/** A time axis with some six ticks at round values. */
export function axis (total) {
  const rough = total / 6
  const power = 10 ** Math.floor(Math.log10(rough))
  const step = [1, 2, 5, 10].map(factor => factor * power).find(size => size >= rough)
  const ticks = []
  for (let at = 0; at <= total * 0.96; at += step) ticks.push(el('span', { style: { 'inset-inline-start': `${(100 * at / total).toFixed(2)}%` } }, at === 0 ? '0' : at >= 1_000 ? `${+(at / 1_000).toPrecision(3)} s` : `${+at.toPrecision(3)} ms`))
  return el('div', { class: 'axis', aria: { hidden: 'true' } }, ...ticks)
}

export function bar (span, { zero, total }) {
  const start = 100 * (span.offsetMs - zero) / total
  return el('i', { class: span.status.code === 'error' ? 'failed' : '', style: { 'inset-inline-start': `${Math.min(start, 99.6).toFixed(3)}%`, 'inline-size': `${Math.max(0.4, 100 * span.durationMs / total).toFixed(3)}%` } })
}

/** The spans below each span, by its id, in order of their start; those without a parent here are below null. */
export function childrenOf (spans) {
  const ids = new Set(spans.map(span => span.spanId))
  const children = new Map()
  for (const span of spans) {
    const parent = ids.has(span.parentSpanId) && span.parentSpanId !== span.spanId ? span.parentSpanId : null
    if (children.has(parent)) children.get(parent).push(span)
    else children.set(parent, [span])
  }
  return children
}

export function factsOf (span) {
  const facts = FACTS.flatMap(([key, show]) => span.attributes[key] === undefined ? [] : [show(span.attributes[key])])
  if (span.attributes['epd.node'] === undefined && span.instance !== null) facts.unshift(nameOf(span.instance))
  if (span.status.code === 'error') facts.unshift([span.attributes['error.type'], named(span.status.message)].filter(Boolean).join(': '))
  if (span.attributes['epd.aborted'] === true) facts.unshift('client left')
  return facts.filter(Boolean).join(' · ')
}
