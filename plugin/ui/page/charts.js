import { onAddress, readAddress, writeAddress } from './address.js'
import { el, ms, svg } from './dom.js'

/** The charted series: name, title, what is measured. */
const SERIES = [
  ['request', 'Request', 'whole'],
  ['firstToken', 'First token', 'of streams'],
  ['perToken', 'Per token', 'of streams, after the first'],
  ['encode', 'Encode', 'call to an encoder'],
  ['handoff', 'Hand-off', 'call to a prefill node'],
  ['generate', 'Generate', 'call to the language model'],
  ['migrate', 'Migrate', 'pulling blocks'],
  ['prefill', 'Prefill', 'in the engine'],
  ['decode', 'Decode', 'in the engine']
]
/** Charted only with prefill nodes. */
const OPTIONAL = 'handoff'
const RANGES = { '5m': { title: 'last 5 minutes', tick: 120_000 }, '1h': { title: 'last hour', tick: 1_200_000 } }
const [WIDTH, HEIGHT] = [600, 60]
/** Height of the marks of failed calls at the bottom. */
const FAILED = 5

/** A small chart for each series: in each slot of time a bar from the median to the 95th percentile. Logarithmic, because stages last 1 ms to 10 s. */
export class Charts {
  #box
  #title
  #buttons
  #shown = ''
  #asked = 0

  constructor (box, title, buttons, onChange) {
    this.#box = box
    this.#title = title
    this.#buttons = buttons
    onAddress(() => { this.#mark() })
    for (const button of buttons.querySelectorAll('button')) {
      button.addEventListener('click', () => {
        writeAddress({ range: button.value === '5m' ? undefined : button.value })
        this.#mark()
        onChange()
      })
    }
    this.#mark()
  }

  /** Asks for the charts once a slot, or sooner when there is something to show: other sums than before. */
  async update (state) {
    const { range = '5m' } = readAddress()
    const key = `${range} ${Math.floor(state.at / 5_000)} ${Object.values(state.lately).map(({ calls, failed }) => calls + failed)}`
    if (key === this.#shown) return
    const turn = ++this.#asked
    const answer = await fetch(`charts?range=${range}`)
    if (!answer.ok || turn !== this.#asked) return
    this.#shown = key
    this.#draw(await answer.json(), RANGES[range])
  }

  #mark () {
    const { range = '5m' } = readAddress()
    this.#title.textContent = RANGES[range].title
    for (const button of this.#buttons.querySelectorAll('button')) button.setAttribute('aria-pressed', String(button.value === range))
  }

  #draw (charts, { tick }) {
    const charted = SERIES.filter(([name]) => name !== OPTIONAL || charts.series[name].slots.length > 0)
    this.#box.replaceChildren(...charted.map(([name, title, note]) => chart(name, title, note, charts.series[name], charts, tick)))
  }
}

function chart (name, title, note, { slots, ...sums }, { at, step, slots: wide }, tick) {
  const from = at - wide * step
  const [low, high] = bounds(slots)
  const x = time => (time - from) / (wide * step) * WIDTH
  const y = value => HEIGHT - FAILED - 2 - (Math.log10(value) - low) / (high - low) * (HEIGHT - FAILED - 4)
  const ys = slots.length === 0 ? [] : ticks(low, high)
  const xs = []
  for (let time = Math.ceil((from + tick / 4) / tick) * tick; time < at - tick / 4; time += tick) xs.push(time)
  const grid = [...ys.map(value => line(0, y(value), WIDTH, y(value))), ...xs.map(time => line(x(time), 0, x(time), HEIGHT))]
  const thick = Math.max(1, WIDTH / wide - 2)
  const bars = slots.map(([start, calls, failed, p50, p95]) => svg('g', {},
    described(start, calls, failed, p50, p95),
    ...p50 === null ? [] : [rect('range', x(start), y(p95), thick, Math.max(1.5, y(p50) - y(p95))), rect('median', x(start), y(p50) - 1, thick, 2)],
    ...failed > 0 ? [rect('failed', x(start), HEIGHT - FAILED, thick, FAILED)] : []))
  return el('figure', { class: 'stage', data: { stage: name } },
    el('figcaption', {}, el('b', {}, title), el('span', { title: note }, note)),
    el('div', { class: 'plot' },
      svg('svg', { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: 'none', role: 'img', 'aria-label': spoken(title, sums) }, ...grid, ...bars),
      ...ys.map(value => el('span', { class: 'y', aria: { hidden: 'true' }, style: { 'inset-block-start': `${(100 * y(value) / HEIGHT).toFixed(1)}%` } }, short(value))),
      ...xs.map(time => el('span', { class: 'x', aria: { hidden: 'true' }, style: { 'inset-inline-start': `${(100 * x(time) / WIDTH).toFixed(1)}%` } }, clock(time)))),
    el('p', {}, sums.p50 === null ? 'no calls' : `p50 ${ms(sums.p50)}`, el('span', {}, sums.p95 === null ? '' : `p95 ${ms(sums.p95)}`), el('span', { class: 'failed' }, sums.failed === 0 ? '' : `${sums.failed} failed`)))
}

/** Powers of ten around the values, at least half a decade. */
function bounds (slots) {
  const values = slots.flatMap(slot => slot[3] === null ? [] : [slot[3], slot[4]])
  if (values.length === 0) return [0, 2]
  const low = Math.log10(Math.min(...values)) - 0.1
  const high = Math.log10(Math.max(...values)) + 0.1
  const spare = Math.max(0, 0.5 - (high - low)) / 2
  return [low - spare, high + spare]
}

/** Two to four round values between the bounds. */
function ticks (low, high) {
  const all = []
  for (let power = Math.floor(low); power <= high; power++) for (const digit of [1, 2, 5]) all.push(digit * 10 ** power)
  const inside = all.filter(value => Math.log10(value) > low + 0.04 && Math.log10(value) < high - 0.02)
  const decades = inside.filter(value => Number.isInteger(Math.round(Math.log10(value) * 1e6) / 1e6))
  if (decades.length >= 2) return thin(decades, 3)
  return thin(inside, 3)
}

function thin (values, most) {
  const every = Math.ceil(values.length / most)
  return values.filter((_, i) => i % every === 0)
}

function line (x1, y1, x2, y2) {
  return svg('line', { x1: x1.toFixed(1), y1: y1.toFixed(1), x2: x2.toFixed(1), y2: y2.toFixed(1), class: 'grid' })
}

function rect (kind, x, y, width, height) {
  return svg('rect', { class: kind, x: x.toFixed(1), y: y.toFixed(1), width: width.toFixed(1), height: height.toFixed(1) })
}

/** Shown when the pointer rests on the slot. */
function described (start, calls, failed, p50, p95) {
  const title = svg('title')
  title.textContent = `${clock(start, true)}: ${calls} well${p50 === null ? '' : `, p50 ${ms(p50)}, p95 ${ms(p95)}`}${failed > 0 ? `, ${failed} failed` : ''}`
  return title
}

function spoken (title, { calls, failed, p50, p95 }) {
  return p50 === null && failed === 0 ? `${title}: no calls` : `${title}: ${p50 === null ? '' : `median ${ms(p50)}, 95th percentile ${ms(p95)}, `}${calls} calls went well, ${failed} failed`
}

function short (value) {
  return value >= 1_000 ? `${+(value / 1_000).toPrecision(2)} s` : `${+value.toPrecision(2)} ms`
}

function clock (time, seconds = false) {
  return new Date(time).toLocaleTimeString('en-GB', { hour: '2-digit', minute: '2-digit', ...(seconds ? { second: '2-digit' } : {}), hour12: false })
}
