/**
 * A meter of this gateway alone and its numbers as Prometheus text: GET /metrics is true without any SDK in the
 * process, and with several gateways in it. Loaded only where the route is mounted.
 */
import type { Meter } from '@opentelemetry/api'
import { PrometheusExporter, PrometheusSerializer } from '@opentelemetry/exporter-prometheus'
import { MeterProvider } from '@opentelemetry/sdk-metrics'
import { VERSION } from '../../adapters/wire/version.ts'
import { SCHEMA_URL, TRACER_NAME } from '../../adapters/wire/semconv.ts'
import { BOUNDS } from './instruments.ts'

export interface Prometheus {
  readonly meter: Meter
  readonly contentType: string
  /** Reads every number at this moment. */
  text (): Promise<string>
  close (): Promise<void>
}

/** The suffix is what a collector makes of the unit `s`; the exporter leaves it out. */
const VIEWS = Object.keys(BOUNDS).map(name => ({ instrumentName: name, name: `${name}_seconds` }))

export function createPrometheus (): Prometheus {
  const reader = new PrometheusExporter({ preventServerStart: true })
  const provider = new MeterProvider({ readers: [reader], views: VIEWS })
  const serializer = new PrometheusSerializer(undefined, false, undefined, true, true)
  return {
    meter: provider.getMeter(TRACER_NAME, VERSION, { schemaUrl: SCHEMA_URL }),
    contentType: 'text/plain; version=0.0.4; charset=utf-8',
    async text () {
      const { resourceMetrics, errors } = await reader.collect()
      if (errors.length > 0) throw new AggregateError(errors, 'metrics could not be read')
      return serializer.serialize(resourceMetrics)
    },
    async close () { await provider.shutdown() }
  }
}
