/** The OpenTelemetry SDK. Loaded where it is asked for only, as it takes its time to load. */
import type { Resource } from '@opentelemetry/resources'
import { BatchSpanProcessor, NodeTracerProvider, type SpanProcessor } from '@opentelemetry/sdk-trace-node'
import { otlpExporter } from '../../adapters/wire/otlp-exporter.ts'
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
  if (otlp) spanProcessors.push(new BatchSpanProcessor(otlpExporter(onProblem)))
  return new NodeTracerProvider({ resource, spanProcessors, idGenerator: { generateTraceId: randomTraceId, generateSpanId: randomSpanId } })
}
