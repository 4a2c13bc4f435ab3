import type { Gateway } from '../gateway.ts'
import { healthOf, type Health } from '../routes/ops.ts'
import { ATTR, SPAN } from '../telemetry/semconv.ts'
import type { StoredSpan, TraceStore, TraceSummary } from '../telemetry/trace-store.ts'
import { VERSION } from '../version.ts'

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

/** [when it ended, in ms of Unix time; how long it took, in ms; 1 when it failed] */
export type Point = readonly [at: number, ms: number, failed: 0 | 1]

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
  readonly stages: Readonly<Record<string, readonly Point[]>>
  readonly capture: boolean
}

const TRACES = 60
const POINTS = 160
/** Charted stages by the span that tells of them. */
const STAGE_OF: Readonly<Record<string, string>> = {
  [SPAN.encodeCall]: 'encode',
  [SPAN.engineMigrate]: 'migrate',
  [SPAN.enginePrefill]: 'prefill',
  [SPAN.engineDecode]: 'decode',
  [SPAN.decode]: 'generate'
}
const STAGES = ['request', 'encode', 'generate', 'migrate', 'prefill', 'decode'] as const

/** Gathers what the page shows. Listens to the trace store only while somebody looks. */
export class Feed {
  readonly #gateway: Gateway
  readonly #store: TraceStore | undefined
  readonly #points = new Map<string, Point[]>(STAGES.map(stage => [stage, []]))
  #unwatch: (() => void) | undefined

  constructor (gateway: Gateway, store: TraceStore | undefined) {
    this.#gateway = gateway
    this.#store = store
  }

  start (): void {
    if (this.#store === undefined || this.#unwatch !== undefined) return
    for (const points of this.#points.values()) points.length = 0
    for (const span of this.#store.lastSpans(POINTS)) this.#note(span)
    for (const points of this.#points.values()) points.sort((one, other) => one[0] - other[0])
    this.#unwatch = this.#store.watch(span => { this.#note(span) })
  }

  stop (): void {
    this.#unwatch?.()
    this.#unwatch = undefined
  }

  state (): FeedState {
    const gateway = this.#gateway
    const { stats } = gateway
    return {
      at: Date.now(),
      version: VERSION,
      health: healthOf(gateway),
      inFlight: gateway.inFlight,
      requests: stats.requests(),
      retries: stats.retries,
      admission: gateway.admission.stats,
      nodes: nodesOf(gateway),
      links: linksOf(gateway),
      traces: this.#store === undefined ? null : this.#store.list({ limit: TRACES }),
      stages: Object.fromEntries(this.#points),
      capture: gateway.thumbnails !== undefined
    }
  }

  #note ({ name, start, end, attributes, status }: StoredSpan): void {
    const stage = attributes[ATTR.operation] !== undefined ? 'request' : STAGE_OF[name]
    const points = stage === undefined ? undefined : this.#points.get(stage)
    if (points === undefined) return
    const ms = (end[0] - start[0]) * 1e3 + (end[1] - start[1]) / 1e6
    points.push([Math.round(end[0] * 1e3 + end[1] / 1e6), Math.round(ms * 100) / 100, status === 'error' ? 1 : 0])
    if (points.length > POINTS) points.shift()
  }
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
    breakers: Object.fromEntries((['encode', 'migrate', 'prefill', 'decode'] as const).flatMap(stage => breakers[stage] === 'closed' ? [] : [[stage, breakers[stage]]])),
    notes
  }))
}

function linksOf ({ registry, stats }: Gateway): LinkStatus[] {
  const moved = new Map(stats.links().map(({ from, to, bytes }) => [`${from} ${to}`, bytes]))
  return registry.snapshot().nodes.flatMap(({ id, links }) => [...links.values()]
    .filter(link => link.from === id)
    .map(({ from, to, state, reason, link }) => ({ from, to, state, transport: link?.transport ?? null, reason: reason ?? null, bytes: moved.get(`${from} ${to}`) ?? 0 })))
}
