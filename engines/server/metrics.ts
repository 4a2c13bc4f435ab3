import { Counter, Gauge, Histogram, Registry } from 'prom-client'
import { GAUGES, type EngineService, type GaugeName, type LatencyName } from '../service/engine-service.ts'

/** Bounds of the GenAI semantic conventions for servers, seconds. */
const TTFT_BOUNDS = [0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10]
const TPOT_BOUNDS = [0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5]
const DURATION_BOUNDS = [0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92]

export interface EngineMetrics {
  readonly contentType: string
  /** Prometheus text. Gauges and counters are read from the engine at this moment. */
  text (): Promise<string>
  /** Head of the request to the last byte of its answer. */
  observeRequest (operation: string, seconds: number): void
}

/** The engine's metrics in a registry of their own: a process may hold several engines (tests do). */
export function engineMetrics (engine: EngineService): EngineMetrics {
  const registry = new Registry()
  const labels = { gen_ai_request_model: engine.model.name }
  const gauges = gaugesOf(engine, registry)
  const counters = countersOf(engine, registry)
  const duration = histogram(registry, 'gen_ai_server_request_duration_seconds', 'Whole requests', DURATION_BOUNDS)
  const latencies: Record<LatencyName, Histogram<string>> = {
    time_to_first_token: histogram(registry, 'gen_ai_server_time_to_first_token_seconds', 'Arrival to first token: queue, migration, prefill', TTFT_BOUNDS),
    time_per_output_token: histogram(registry, 'gen_ai_server_time_per_output_token_seconds', 'Mean time of a token after the first', TPOT_BOUNDS)
  }
  engine.counters.onObserve((name, seconds) => { latencies[name].observe({ gen_ai_operation_name: 'chat', ...labels }, seconds) })
  return {
    contentType: registry.contentType,
    async text () {
      gauges()
      counters()
      return await registry.metrics()
    },
    observeRequest: (operation, seconds) => { duration.observe({ gen_ai_operation_name: operation, ...labels }, seconds) }
  }
}

function gaugesOf (engine: EngineService, registry: Registry): () => void {
  const registers = [registry]
  const gauges = Object.entries(GAUGES).map(([name, help]) => [name as GaugeName, new Gauge({ name, help, registers })] as const)
  const sequences = new Gauge({ name: 'epd_sequences', help: 'Sequences (in an encoder: items) by status', labelNames: ['status'], registers })
  return () => {
    const values = engine.gauges()
    for (const [name, gauge] of gauges) gauge.set(values[name] ?? 0)
    // A status that is left out has none: it must not keep the number it had.
    sequences.reset()
    for (const [status, count] of Object.entries(engine.sequences())) sequences.set({ status }, count)
  }
}

/** The engine counts in plain numbers; prom-client's counters can only be added to, so they are set anew at each reading. */
function countersOf (engine: EngineService, registry: Registry): () => void {
  const registers = [registry]
  const counters: Array<[() => number, Counter]> = [
    [() => engine.counters.encodedItems, new Counter({ name: 'epd_encoded_items_total', help: 'Items that went through the vision encoder', registers })],
    [() => engine.counters.encoderCacheHits, new Counter({ name: 'epd_encoder_cache_hits_total', help: 'Items whose features were there already, or on their way', registers })],
    [() => engine.counters.migratedBytes, new Counter({ name: 'epd_migrated_bytes_total', help: 'Bytes of blocks pulled into this engine', registers })],
    [() => engine.counters.acks, new Counter({ name: 'epd_acks_total', help: 'ACKs that ended a lease of this engine', registers })]
  ]
  return () => {
    for (const [read, counter] of counters) {
      counter.reset()
      counter.inc(read())
    }
  }
}

function histogram (registry: Registry, name: string, help: string, buckets: number[]): Histogram<string> {
  return new Histogram({ name, help, buckets, labelNames: ['gen_ai_operation_name', 'gen_ai_request_model'], registers: [registry] })
}
