import type { Gateway, Health } from '../gateway.ts'
import { ATTR, SPAN } from '../../adapters/wire/semconv.ts'
import type { Breakers } from '../registry/index.ts'
import type { StoredSpan } from '../traces/span.ts'
import { outcomeOf, perTokenMs, type TraceSummary } from '../traces/summary.ts'
import { NodeErrors, type NodeError } from './node-errors.ts'
import { VERSION } from '../../adapters/wire/version.ts'
import { NodeGauges, type Gauges } from './gauges.ts'
import { Histograms, RANGES, type Range, type Slot, type Sum } from './histograms.ts'

export interface NodeView {
  readonly id: string
  readonly role: string
  readonly state: string
  readonly backend: string | null
  readonly models: readonly string[]
  readonly requests: number
  readonly tokens: number
  readonly encoded: number
  readonly cached: number
  /** Stages whose breaker is not closed. */
  readonly breakers: Readonly<Record<string, string>>
  readonly notes: readonly string[]
  /** What it says of its queue and caches; null: nothing. */
  readonly gauges: Gauges | null
}

/** One node for the page that looks at it. */
export interface NodeDetail {
  readonly state: string
  readonly adapter: string
  readonly version: string | null
  readonly vision: string | null
  readonly speed: number
  /** By an operator. */
  readonly drained: boolean
  /** Calls that have begun, of those that are planned on it. */
  readonly active: number
  readonly work: number
  /** Vision tokens that it encodes in a second. */
  readonly rate: number | null
  readonly breakers: Breakers
  readonly links: readonly LinkStatus[]
  /** Newest first. */
  readonly errors: readonly NodeError[]
}

export interface LinkStatus {
  readonly from: string
  readonly to: string
  readonly state: string
  readonly transport: string | null
  readonly reason: string | null
  readonly bytes: number
}

/** All that the page shows beside the selected trace. Whole at each tick, so that a reader who missed one has missed nothing. */
export interface FeedState {
  readonly at: number
  readonly version: string
  readonly health: Health
  readonly inFlight: number
  readonly requests: ReadonlyArray<{ readonly plan: string, readonly outcome: string, readonly count: number }>
  readonly retries: number
  readonly admission: { readonly inFlight: number, readonly waiting: number, readonly refused: number }
  readonly nodes: readonly NodeView[]
  readonly links: readonly LinkStatus[]
  /** Newest first; null when no traces are kept. */
  readonly traces: readonly TraceSummary[] | null
  /** Why none are kept. */
  readonly tracesOff: string | null
  /** Of each charted series the last five minutes together. */
  readonly lately: Readonly<Record<string, Sum>>
  readonly capture: boolean
}

export interface Charts {
  /** Now, and how long a slot is, in ms. */
  readonly at: number
  readonly step: number
  readonly slots: number
  readonly series: Readonly<Record<string, Sum & { readonly slots: readonly Slot[] }>>
}

const TRACES = 60
/** Traces of a store that was there before the gateway, to begin the charts with. */
const LOOK_BACK = 1_000
/** Charted calls by their span. A map: a node may call a span `constructor`. */
const SERIES_OF: ReadonlyMap<string, string> = new Map([
  [SPAN.encodeCall, 'encode'],
  [SPAN.engineMigrate, 'migrate'],
  [SPAN.enginePrefill, 'prefill'],
  [SPAN.engineDecode, 'decode'],
  [SPAN.prefill, 'handoff'],
  [SPAN.decode, 'generate']
])
const SERIES = ['request', 'firstToken', 'perToken', 'encode', 'handoff', 'generate', 'migrate', 'prefill', 'decode'] as const

/**
 * Gathers what the page shows. Listens to the trace store for as long as the gateway runs, so that a page that is opened
 * has the hour before; a span that is charted costs 0.13 us.
 */
export class Feed {
  readonly #gateway: Gateway
  readonly #series = new Map<string, Histograms>(SERIES.map(name => [name, new Histograms()]))
  readonly #gauges: NodeGauges
  readonly #errors = new NodeErrors()
  readonly #unwatch: (() => void) | undefined

  constructor (gateway: Gateway) {
    this.#gateway = gateway
    this.#gauges = new NodeGauges(gateway)
    const { store } = gateway.tracing
    for (const span of store?.lastSpans(LOOK_BACK) ?? []) this.#note(span)
    this.#unwatch = store?.watch(span => { this.#note(span) })
  }

  /** A page is open. */
  start (): void {
    this.#gauges.start()
  }

  /** The last one was closed. */
  stop (): void {
    this.#gauges.stop()
  }

  close (): void {
    this.stop()
    this.#unwatch?.()
  }

  charts (range: Range): Charts {
    const at = Date.now()
    return { at, ...RANGES[range], series: Object.fromEntries([...this.#series].map(([name, histograms]) => [name, { ...histograms.sum(range, at), slots: histograms.chart(range, at) }])) }
  }

  node (id: string): NodeDetail | undefined {
    const node = this.#gateway.registry.get(id)
    if (node === undefined) return undefined
    const { state, adapter, info, speed, drained = false, load, breakers: { encode, prefill, decode } } = node
    return {
      state,
      adapter: adapter.name,
      version: info?.version ?? null,
      vision: info?.vision ?? null,
      speed,
      drained,
      active: load.active ?? load.requests,
      work: load.work,
      rate: load.rate === undefined ? null : Math.round(load.rate),
      breakers: { encode, prefill, decode },
      links: linksOf(this.#gateway).filter(({ from, to }) => from === id || to === id),
      errors: this.#errors.of(id)
    }
  }

  state (): FeedState {
    const gateway = this.#gateway
    const { stats, tracing: { store, off } } = gateway
    const now = Date.now()
    return {
      at: now,
      version: VERSION,
      health: gateway.health,
      inFlight: gateway.inFlight,
      requests: stats.requests(),
      retries: stats.retries,
      admission: gateway.admission.stats,
      nodes: nodesOf(gateway, this.#gauges),
      links: linksOf(gateway),
      traces: off === undefined ? store!.list({ limit: TRACES }) : null,
      tracesOff: off ?? null,
      lately: Object.fromEntries([...this.#series].map(([name, histograms]) => [name, histograms.sum('5m', now)])),
      capture: gateway.thumbnails !== undefined
    }
  }

  #note (span: StoredSpan): void {
    const { name, kind, attributes } = span
    this.#errors.note(span)
    const ms = millis(span)
    const series = SERIES_OF.get(name)
    if (series !== undefined) return this.#add(series, span, ms)
    // The request's own span is named after its model.
    if (kind !== 'client' || attributes[ATTR.operation] === undefined) return
    const { [ATTR.timeToFirstChunk]: first, [ATTR.outputTokens]: tokens } = attributes
    const outcome = outcomeOf(span)
    // How soon a request was refused, or its client left, says nothing of the nodes.
    if (outcome === 'refused' || outcome === 'aborted') return
    this.#add('request', span, ms)
    if (typeof first !== 'number' || outcome === 'error') return
    this.#add('firstToken', span, first * 1e3)
    const perToken = typeof tokens === 'number' ? perTokenMs(first * 1e3, ms, tokens) : undefined
    if (perToken !== undefined) this.#add('perToken', span, perToken)
  }

  /** At the latest now: an engine's clock may be ahead, and its calls would take the places of those to come. */
  #add (series: string, { endTime: [seconds, nanoseconds], status }: StoredSpan, ms: number): void {
    this.#series.get(series)!.note(Math.min(seconds * 1e3 + nanoseconds / 1e6, Date.now()), ms, status === 'error')
  }
}

function millis ({ startTime, endTime }: StoredSpan): number {
  return (endTime[0] - startTime[0]) * 1e3 + (endTime[1] - startTime[1]) / 1e6
}

function nodesOf ({ registry, stats }: Gateway, gauges: NodeGauges): NodeView[] {
  const encoders = new Map(stats.encoders().map(one => [one.node, one]))
  return registry.snapshot().nodes.map(({ id, role, state, info, models, load, breakers, notes }) => ({
    id,
    role,
    state,
    backend: info?.backend ?? null,
    models,
    requests: load.requests,
    tokens: load.tokens,
    encoded: encoders.get(id)?.items ?? 0,
    cached: encoders.get(id)?.cached ?? 0,
    breakers: Object.fromEntries((['encode', 'prefill', 'decode'] as const).flatMap(stage => breakers[stage] === 'closed' ? [] : [[stage, breakers[stage]]])),
    notes,
    gauges: gauges.of(id) ?? null
  }))
}

function linksOf ({ registry, stats }: Gateway): LinkStatus[] {
  const moved = new Map(stats.links().map(({ from, to, bytes }) => [`${from} ${to}`, bytes]))
  return registry.snapshot().nodes.flatMap(({ id, links }) => [...links.values()]
    .filter(link => link.from === id)
    .map(({ from, to, state, reason, link }) => ({ from, to, state, transport: link?.transport ?? null, reason: reason ?? null, bytes: moved.get(`${from} ${to}`) ?? 0 })))
}
