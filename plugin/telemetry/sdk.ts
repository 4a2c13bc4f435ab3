/**
 * The OpenTelemetry SDK for the command line's own processes. Library code never imports this file: in somebody
 * else's gateway the SDK is theirs.
 */
import { trace } from '@opentelemetry/api'
import { W3CTraceContextPropagator } from '@opentelemetry/core'
import { OTLPTraceExporter } from '@opentelemetry/exporter-trace-otlp-http'
import { defaultResource, detectResources, envDetector, resourceFromAttributes } from '@opentelemetry/resources'
import { BatchSpanProcessor, NodeTracerProvider, type SpanProcessor } from '@opentelemetry/sdk-trace-node'
import { VERSION } from '../version.ts'
import { randomSpanId, randomTraceId } from './ids.ts'
import { ATTR } from './semconv.ts'
import { storeProcessor } from './store-processor.ts'
import type { TraceStore } from './trace-store.ts'

export interface TelemetryOptions {
  /** Gets every sampled span of this process. */
  readonly store: TraceStore
  /** `service.name` unless OTEL_SERVICE_NAME says otherwise. @default 'fastify-epd' */
  readonly serviceName?: string
}

export interface Telemetry {
  /** False: OTEL_SDK_DISABLED, or another SDK was there first. */
  readonly enabled: boolean
  /** Sends what is left. Never rejects. */
  close (): Promise<void>
}

const OFF: Telemetry = { enabled: false, async close () {} }

/**
 * Registers a tracer provider that feeds the store and, when an endpoint is configured by OTEL_EXPORTER_OTLP_*, an
 * OTLP/HTTP receiver. Sampler, limits and batching follow the standard OTEL_* variables. Call it before the gateway
 * is built. A provider that is already registered (`node --import otel.mjs`) is left alone.
 */
export function startTelemetry ({ store, serviceName = 'fastify-epd' }: TelemetryOptions): Telemetry {
  if (process.env.OTEL_SDK_DISABLED?.toLowerCase() === 'true' || providerRegistered()) return OFF
  const spanProcessors: SpanProcessor[] = [storeProcessor(store)]
  if (otlpConfigured()) spanProcessors.push(new BatchSpanProcessor(new OTLPTraceExporter()))
  const provider = new NodeTracerProvider({
    resource: resourceOf(serviceName), spanProcessors, idGenerator: { generateTraceId: randomTraceId, generateSpanId: randomSpanId }
  })
  // No context manager: the pipeline hands contexts on itself, nothing else is instrumented in this process, and
  // following contexts through every promise costs more than the spans do.
  provider.register({ contextManager: null, propagator: new W3CTraceContextPropagator() })
  return {
    enabled: true,
    async close () {
      // A receiver that is down must not turn a clean exit into a failed one.
      await provider.shutdown().catch(() => {})
      trace.disable()
    }
  }
}

function providerRegistered (): boolean {
  const proxy = trace.getTracerProvider() as { getDelegate?: () => object }
  const delegate = proxy.getDelegate?.()
  return delegate !== undefined && delegate.constructor.name !== 'NoopTracerProvider'
}

function otlpConfigured (): boolean {
  const { OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_EXPORTER_OTLP_TRACES_ENDPOINT, OTEL_TRACES_EXPORTER } = process.env
  return OTEL_TRACES_EXPORTER !== 'none' && Boolean(OTEL_EXPORTER_OTLP_TRACES_ENDPOINT || OTEL_EXPORTER_OTLP_ENDPOINT)
}

function resourceOf (serviceName: string): ReturnType<typeof defaultResource> {
  const ours = resourceFromAttributes({ [ATTR.serviceName]: serviceName, [ATTR.serviceVersion]: VERSION })
  return defaultResource().merge(ours).merge(detectResources({ detectors: [envDetector] }))
}
