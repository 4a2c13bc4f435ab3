import type { Gateway, Health } from '../gateway.ts'
import { ATTR, SPAN } from '../../adapters/wire/semconv.ts'
import type { StoredSpan } from '../traces/span.ts'
import type { TraceSummary } from '../traces/summary.ts'
import { VERSION } from '../../adapters/wire/version.ts'
import { Points, type Point } from './points.ts'

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
  readonly stages: Readonly<Record<string, readonly Point[]>>
  readonly capture: boolean
}

const TRACES = 60
/** Traces that a page that is opened looks back for points: as many as charts show. */
const LOOK_BACK = 300
/** Charted stages by their span. */
const STAGE_OF: Readonly<Record<string, string>> = {
  [SPAN.encodeCall]: 'encode',
  [SPAN.engineMigrate]: 'migrate',
  [SPAN.enginePrefill]: 'prefill',
  [SPAN.engineDecode]: 'decode',
  [SPAN.prefill]: 'handoff',
  [SPAN.decode]: 'generate'
}
const STAGES = ['request', 'encode', 'handoff', 'generate', 'migrate', 'prefill', 'decode'] as const

/**
 * Gathers what the page shows. Listens to the trace store only while a page is open, and then does next to nothing for
 * each span: what it costs goes by the ticks, not by the requests.
 */
export class Feed {
  readonly #gateway: Gateway
  #points = pointsByStage()
  #unwatch: (() => void) | undefined

  constructor (gateway: Gateway) {
    this.#gateway = gateway
  }

  start (): void {
    const { store } = this.#gateway.tracing
    if (store === undefined || this.#unwatch !== undefined) return
    this.#points = pointsByStage()
    for (const span of store.lastSpans(LOOK_BACK)) this.#note(span)
    this.#unwatch = store.watch(span => { this.#note(span) })
  }

  stop (): void {
    this.#unwatch?.()
    this.#unwatch = undefined
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
      nodes: nodesOf(gateway),
      links: linksOf(gateway),
      traces: off === undefined ? store!.list({ limit: TRACES }) : null,
      tracesOff: off ?? null,
      stages: Object.fromEntries([...this.#points].map(([stage, points]) => [stage, points.since(now)])),
      capture: gateway.thumbnails !== undefined
    }
  }

  #note (span: StoredSpan): void {
    const stage = STAGE_OF[span.name]
    if (stage !== undefined) return this.#points.get(stage)!.note(span)
    // The request's own span is named after its model. Looked at last is what costs most: its attributes.
    const requests = this.#points.get('request')!
    if (span.kind === 'client' && requests.takes(span) && span.attributes[ATTR.operation] !== undefined) requests.note(span)
  }
}

function pointsByStage (): Map<string, Points> {
  return new Map(STAGES.map(stage => [stage, new Points()]))
}

function nodesOf ({ registry, stats }: Gateway): NodeView[] {
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
    notes
  }))
}

function linksOf ({ registry, stats }: Gateway): LinkStatus[] {
  const moved = new Map(stats.links().map(({ from, to, bytes }) => [`${from} ${to}`, bytes]))
  return registry.snapshot().nodes.flatMap(({ id, links }) => [...links.values()]
    .filter(link => link.from === id)
    .map(({ from, to, state, reason, link }) => ({ from, to, state, transport: link?.transport ?? null, reason: reason ?? null, bytes: moved.get(`${from} ${to}`) ?? 0 })))
}
