import { defaultResource, detectResources, envDetector, resourceFromAttributes } from '@opentelemetry/resources'
import { BatchSpanProcessor, NodeTracerProvider } from '@opentelemetry/sdk-trace-node'
import { otlpConfigured } from '../../adapters/wire/otel-env.ts'
import { otlpExporter } from '../../adapters/wire/otlp-exporter.ts'
import { ATTR, TRACER_NAME } from '../../adapters/wire/semconv.ts'
import { VERSION } from '../../adapters/wire/version.ts'

/**
 * The provider of a gateway whose application has no OpenTelemetry SDK. Sampler, limits, batching, resource and
 * receiver follow the standard OTEL_* variables. It has no context manager: the pipeline hands contexts on itself, and
 * following them through every promise costs more than the spans do.
 */
export function ownProvider (onProblem: (message: string) => void): NodeTracerProvider {
  const ours = resourceFromAttributes({ [ATTR.serviceName]: TRACER_NAME, [ATTR.serviceVersion]: VERSION })
  const environment = detectResources({ detectors: [envDetector] })
  return new NodeTracerProvider({
    resource: defaultResource().merge(ours).merge(environment),
    spanProcessors: otlpConfigured() ? [new BatchSpanProcessor(otlpExporter(onProblem))] : []
  })
}
