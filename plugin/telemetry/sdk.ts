/** The OpenTelemetry SDK. Loaded where it is asked for only, as it takes its time to load. */
import { ExportResultCode } from '@opentelemetry/core'
import { OTLPTraceExporter } from '@opentelemetry/exporter-trace-otlp-http'
import type { Resource } from '@opentelemetry/resources'
import { BatchSpanProcessor, NodeTracerProvider, type SpanExporter, type SpanProcessor } from '@opentelemetry/sdk-trace-node'
import { randomSpanId, randomTraceId } from './ids.ts'
import { storeProcessor } from './store-processor.ts'
import type { TraceStore } from '../traces/trace-store.ts'

export interface SdkOptions {
  readonly store: TraceStore | undefined
  readonly resource: Resource
  /** Send spans to an OTLP/HTTP receiver. */
  readonly otlp: boolean
  /** Told what became of spans that could not be sent. */
  readonly onProblem: (message: string) => void
}

/** Feeds the store and, if so wanted, an OTLP/HTTP receiver. Sampler, limits and batching follow the OTEL_* variables. */
export function sdkProvider ({ store, resource, otlp, onProblem }: SdkOptions): NodeTracerProvider {
  const spanProcessors: SpanProcessor[] = []
  if (store !== undefined) spanProcessors.push(storeProcessor(store))
  if (otlp) spanProcessors.push(new BatchSpanProcessor(telling(new OTLPTraceExporter(), onProblem)))
  return new NodeTracerProvider({ resource, spanProcessors, idGenerator: { generateTraceId: randomTraceId, generateSpanId: randomSpanId } })
}

/** Says so when it starts to lose spans; the SDK drops them without a word. */
function telling (exporter: SpanExporter, onProblem: (message: string) => void): SpanExporter {
  let losing = false
  return Object.assign(Object.create(exporter) as SpanExporter, {
    export (...[spans, done]: Parameters<SpanExporter['export']>) {
      exporter.export(spans, result => {
        const lost = result.code === ExportResultCode.FAILED
        if (lost && !losing) onProblem(`spans could not be sent to the OTLP receiver: ${result.error?.message ?? 'it refused them'}`)
        losing = lost
        done(result)
      })
    }
  })
}
