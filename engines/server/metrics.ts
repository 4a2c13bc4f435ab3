import { trace, TraceFlags, type Context } from '@opentelemetry/api'
import { expose, type Exposition, type Family } from '../../adapters/wire/exposition.ts'
import { processMetrics } from '../../adapters/wire/process-metrics.ts'
import { Histogram, type Sample } from '../../adapters/wire/series.ts'
import { ATTR } from '../../adapters/wire/semconv.ts'
import { VERSION } from '../../adapters/wire/version.ts'
import { GAUGES, type EngineService, type GaugeName, type LatencyName } from '../service/engine-service.ts'

/** Bounds of the GenAI semantic conventions for servers, seconds. */
const TTFT_BOUNDS = [0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10]
const TPOT_BOUNDS = [0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5]
const DURATION_BOUNDS = [0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92]

export interface EngineMetrics {
  /** Gauges and counters are read from the engine at this moment. @param accept the scraper's header */
  read (accept: string | undefined): Exposition
  /** `seconds`: from the complete request to the last byte of its answer. */
  observeRequest (operation: string, seconds: number, context: Context): void
  close (): void
}

export function engineMetrics (engine: EngineService): EngineMetrics {
  const latency = (bounds: readonly number[]): Histogram => new Histogram(bounds, ATTR.operation, ATTR.requestModel)
  const duration = latency(DURATION_BOUNDS)
  const latencies: Record<LatencyName, Histogram> = { time_to_first_token: latency(TTFT_BOUNDS), time_per_output_token: latency(TPOT_BOUNDS) }
  const { name: model } = engine.model
  engine.counters.onObserve((name, seconds, context) => { latencies[name].record(seconds, ['chat', model], sampledTrace(context)) })
  const process = processMetrics({ component: 'engine', role: engine.role, backend: engine.backend, version: VERSION })
  const histogram = (name: string, help: string, histogram: Histogram): Family => ({ name, type: 'histogram', unit: 's', help, read: () => histogram.distributions() })
  const families = [
    ...gauges(engine),
    ...counters(engine),
    histogram('gen_ai.server.request.duration', 'Whole requests', duration),
    histogram('gen_ai.server.time_to_first_token', 'Arrival to first token: queue, migration, prefill', latencies.time_to_first_token),
    histogram('gen_ai.server.time_per_output_token', 'Mean time of a token after the first', latencies.time_per_output_token),
    ...process.families
  ]
  return {
    read: accept => expose(families, accept),
    observeRequest: (operation, seconds, context) => { duration.record(seconds, [operation, model], sampledTrace(context)) },
    close: process.close
  }
}

/** The trace that an exemplar may name: one that the caller has sampled. */
function sampledTrace (context: Context | undefined): string | undefined {
  const span = context === undefined ? undefined : trace.getSpanContext(context)
  return span !== undefined && (span.traceFlags & TraceFlags.SAMPLED) !== 0 ? span.traceId : undefined
}

function gauges (engine: EngineService): Family[] {
  const read = (name: GaugeName) => () => single(engine.gauges()[name] ?? 0)
  // A status seen stays, at 0.
  const statuses = new Set<string>()
  const sequences = (): Sample[] => {
    const counts = engine.sequences()
    for (const status of Object.keys(counts)) statuses.add(status)
    return [...statuses].map(status => ({ labels: { status }, value: counts[status] ?? 0 }))
  }
  return [
    ...Object.entries(GAUGES).map(([name, help]): Family => ({ name, type: 'gauge', help, read: read(name as GaugeName) })),
    // The names of the first version, for one release: a gauge must not end in `_total`.
    ...(['epd_feature_blocks', 'epd_kv_blocks'] as const).map((blocks): Family => ({ name: `${blocks}_total`, type: 'unknown', help: `Deprecated: ${blocks}_capacity`, read: read(`${blocks}_capacity`) })),
    { name: 'epd_sequences', type: 'gauge', help: 'Sequences (in an encoder: items) by status', read: sequences }
  ]
}

/** The engine counts in plain numbers, so that counting costs its steps nothing. */
function counters ({ counters, p2p }: EngineService): Family[] {
  const counter = (name: string, help: string, read: () => Sample[], unit?: string): Family => ({ name, type: 'counter', help, read, unit })
  return [
    counter('epd_encoded_items', 'Items that went through the vision encoder', () => single(counters.encodedItems)),
    counter('epd_encoder_cache_hits', 'Items whose features were there already, or on their way', () => single(counters.encoderCacheHits)),
    counter('epd_migrated_bytes', 'Bytes of blocks pulled into this engine', () => single(counters.migratedBytes), 'By'),
    counter('epd_ahead_items', 'Features offered before the request they are for, by outcome: pulled ahead of it, used by it, dropped', () => Object.entries(counters.ahead).map(([outcome, value]) => ({ labels: { outcome }, value }))),
    counter('epd_acks', 'ACKs that ended a lease of this engine', () => single(counters.acks)),
    counter('epd_link_refused', 'Messages of peers that were refused, by reason', () => Object.entries(p2p.refused ?? {}).map(([reason, value]) => ({ labels: { reason }, value })))
  ]
}

function single (value: number): Sample[] {
  return [{ labels: {}, value }]
}
