/** A worker says what happens at it: uses of nodes, spans, counts. */
import type { Gateway } from '../../gateway.ts'
import { TraceStore } from '../../traces/store.ts'
import type { StoredSpan } from '../../traces/span.ts'
import { COUNTERS, HISTOGRAMS, type Event } from './calls.ts'

/** Under load, events of this time go in one message. Milliseconds. */
const TOGETHER_MS = 10
/** How often counts are looked at that no event goes with. */
const LOOK_MS = 250

export class Reports {
  readonly #send: (events: readonly Event[]) => void
  #events: Event[] = []
  #timer: NodeJS.Timeout | undefined
  #sentAt = 0
  #gateway: Gateway | undefined
  #inFlight = 0
  #moved = [0, 0] as readonly [number, number]
  #uses = 0

  constructor (send: (events: readonly Event[]) => void) {
    this.#send = send
  }

  /** Where spans go in place of a store. */
  get spans (): TraceStore {
    const add = (span: StoredSpan): void => { this.#add(['span', span]) }
    return new class extends TraceStore {
      override add (span: StoredSpan): StoredSpan {
        add(span)
        return span
      }
    }()
  }

  follow (gateway: Gateway): void {
    this.#gateway = gateway
    const { registry } = gateway
    const acquire = registry.acquire.bind(registry)
    registry.acquire = (id, stage, tokens = 0, work = tokens) => {
      const ticket = acquire(id, stage, tokens, work)
      const use = this.#uses++
      this.#add(['use', use, id, stage, tokens, work])
      let [judged, ended] = [false, false]
      return {
        ...ticket,
        ok: () => {
          if (!judged) this.#add(['ok', use])
          judged = true
          ticket.ok()
        },
        encoded: tokens => {
          this.#add(['encoded', use, tokens])
          ticket.encoded(tokens)
        },
        end: (error, verdict) => {
          if (!ended) this.#add(['end', use, error !== undefined, verdict])
          ended = true
          ticket.end(error, verdict)
        }
      }
    }
    this.#followNumbers(gateway)
    setInterval(() => { this.flush() }, LOOK_MS).unref()
  }

  #followNumbers ({ stats, metrics }: Gateway): void {
    let inner = false
    for (const name of COUNTERS) {
      const counter = stats[name]
      const add = counter.add.bind(counter)
      counter.add = (amount, ...labels) => {
        add(amount, ...labels)
        if (!inner) this.#add(['counted', name, amount, labels.map(label => label ?? null)])
      }
    }
    for (const name of HISTOGRAMS) {
      const histogram = metrics[name]
      const record = histogram.record.bind(histogram)
      histogram.record = (value, labels, traceId) => {
        record(value, labels, traceId)
        this.#add(['measured', name, value, labels.map(label => label ?? null), traceId ?? null])
      }
    }
    const encoded = stats.encoded.bind(stats)
    stats.encoded = (node, items, cached) => {
      inner = true
      encoded(node, items, cached)
      inner = false
      this.#add(['items', node, items, cached])
    }
  }

  /** Sends all that has happened until now. */
  flush (): void {
    clearTimeout(this.#timer)
    this.#timer = undefined
    this.#sentAt = performance.now()
    this.#count()
    if (this.#events.length > 0) this.#send(this.#events.splice(0))
  }

  /** What is left to say. */
  last (): readonly Event[] {
    this.#count()
    return this.#events.splice(0)
  }

  #add (event: Event): void {
    this.#events.push(event)
    // The primary measures encoders' rates by when their uses begin and end.
    if (event[0] === 'encoded' || (event[0] === 'use' && event[3] === 'encode')) this.flush()
    else this.#timer ??= setTimeout(() => { this.flush() }, Math.max(0, this.#sentAt + TOGETHER_MS - performance.now()))
  }

  /** What changes without a call. */
  #count (): void {
    if (this.#gateway === undefined) return
    const { inFlight, stats: { encodeMoves, encodeFallbacks } } = this.#gateway
    if (inFlight !== this.#inFlight) this.#events.push(['inFlight', this.#inFlight = inFlight])
    const [moves, fallbacks] = this.#moved
    if (encodeMoves > moves || encodeFallbacks > fallbacks) this.#events.push(['moved', encodeMoves - moves, encodeFallbacks - fallbacks])
    this.#moved = [encodeMoves, encodeFallbacks]
  }
}
