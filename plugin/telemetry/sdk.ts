/** The OpenTelemetry SDK. Loaded where it is asked for only, as it takes its time to load. */
import { OTLPTraceExporter } from '@opentelemetry/exporter-trace-otlp-http'
import type { Resource } from '@opentelemetry/resources'
import { BatchSpanProcessor, NodeTracerProvider, type SpanProcessor } from '@opentelemetry/sdk-trace-node'
import { randomSpanId, randomTraceId } from './ids.ts'
import { storeProcessor } from './store-processor.ts'
import type { TraceStore } from './trace-store.ts'

/** Feeds the store and, if so wanted, an OTLP/HTTP receiver. Sampler, limits and batching follow the OTEL_* variables. */
export function sdkProvider (store: TraceStore, resource: Resource, otlp: boolean): NodeTracerProvider {
  const spanProcessors: SpanProcessor[] = [storeProcessor(store)]
  if (otlp) spanProcessors.push(new BatchSpanProcessor(new OTLPTraceExporter()))
  return new NodeTracerProvider({ resource, spanProcessors, idGenerator: { generateTraceId: randomTraceId, generateSpanId: randomSpanId } })
}
