import type { Histogram, Meter } from '@opentelemetry/api'
import { PrometheusExporter, PrometheusSerializer } from '@opentelemetry/exporter-prometheus'
import { MeterProvider } from '@opentelemetry/sdk-metrics'
import { ENGINE_TRACER_NAME } from '../../adapters/wire/semconv.ts'
import { GAUGES, type EngineService, type GaugeName, type LatencyName } from '../service/engine-service.ts'

/** Bounds of the GenAI semantic conventions for servers, seconds. */
const TTFT_BOUNDS = [0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10]
const TPOT_BOUNDS = [0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5]
const DURATION_BOUNDS = [0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92]

export interface EngineMetrics {
  readonly contentType: string
  /** Prometheus text. Gauges and counters are read from the engine at this moment. */
  text (): Promise<string>
  /** `seconds`: from the complete request to the last byte of its answer. */
  observeRequest (operation: string, seconds: number): void
}

/** The engine's metrics in a meter of their own: a process may hold several engines (tests do). */
export function engineMetrics (engine: EngineService): EngineMetrics {
  const reader = new PrometheusExporter({ preventServerStart: true })
  const meter = new MeterProvider({ readers: [reader] }).getMeter(ENGINE_TRACER_NAME)
  const serializer = new PrometheusSerializer(undefined, false, undefined, true, true)
  observeGauges(engine, meter)
  observeCounters(engine, meter)
  const duration = histogram(meter, 'gen_ai_server_request_duration_seconds', 'Whole requests', DURATION_BOUNDS)
  const latencies: Record<LatencyName, Histogram> = {
    time_to_first_token: histogram(meter, 'gen_ai_server_time_to_first_token_seconds', 'Arrival to first token: queue, migration, prefill', TTFT_BOUNDS),
    time_per_output_token: histogram(meter, 'gen_ai_server_time_per_output_token_seconds', 'Mean time of a token after the first', TPOT_BOUNDS)
  }
  const labels = { gen_ai_request_model: engine.model.name }
  engine.counters.onObserve((name, seconds) => { latencies[name].record(seconds, { gen_ai_operation_name: 'chat', ...labels }) })
  return {
    contentType: 'text/plain; version=0.0.4; charset=utf-8',
    async text () {
      const { resourceMetrics, errors } = await reader.collect()
      if (errors.length > 0) throw new AggregateError(errors, 'metrics could not be read')
      return serializer.serialize(resourceMetrics)
    },
    observeRequest: (operation, seconds) => { duration.record(seconds, { gen_ai_operation_name: operation, ...labels }) }
  }
}

function observeGauges (engine: EngineService, meter: Meter): void {
  const gauges = Object.entries(GAUGES).map(([name, description]) => [name as GaugeName, meter.createObservableGauge(name, { description })] as const)
  meter.addBatchObservableCallback(result => {
    const values = engine.gauges()
    for (const [name, gauge] of gauges) result.observe(gauge, values[name] ?? 0)
  }, gauges.map(([, gauge]) => gauge))

  // The names of the first version, for one release: of a gauge promtool takes no `_total`.
  for (const blocks of ['epd_feature_blocks', 'epd_kv_blocks'] as const) {
    const name = `${blocks}_capacity` as const
    meter.createObservableGauge(`${blocks}_total`, { description: `Deprecated: ${name}` }).addCallback(result => { result.observe(engine.gauges()[name] ?? 0) })
  }

  // The SDK keeps a status that an engine has left out at its last number, so each status seen stays, at 0.
  const statuses = new Set<string>()
  meter.createObservableGauge('epd_sequences', { description: 'Sequences (in an encoder: items) by status' }).addCallback(result => {
    const counts = engine.sequences()
    for (const status of Object.keys(counts)) statuses.add(status)
    for (const status of statuses) result.observe(counts[status] ?? 0, { status })
  })
}

/** The engine counts in plain numbers, so that counting costs its steps nothing. */
function observeCounters ({ counters, p2p }: EngineService, meter: Meter): void {
  const rows: ReadonlyArray<readonly [name: string, description: string, read: () => number]> = [
    ['epd_encoded_items_total', 'Items that went through the vision encoder', () => counters.encodedItems],
    ['epd_encoder_cache_hits_total', 'Items whose features were there already, or on their way', () => counters.encoderCacheHits],
    ['epd_migrated_bytes_total', 'Bytes of blocks pulled into this engine', () => counters.migratedBytes],
    ['epd_acks_total', 'ACKs that ended a lease of this engine', () => counters.acks]
  ]
  meter.createObservableCounter('epd_link_refused_total', { description: 'Messages of peers that were refused, by reason' }).addCallback(result => {
    for (const [reason, count] of Object.entries(p2p.refused ?? {})) result.observe(count, { reason })
  })
  for (const [name, description, read] of rows) {
    meter.createObservableCounter(name, { description }).addCallback(result => { result.observe(read()) })
  }
}

function histogram (meter: Meter, name: string, description: string, bounds: number[]): Histogram {
  return meter.createHistogram(name, { description, advice: { explicitBucketBoundaries: bounds } })
}
