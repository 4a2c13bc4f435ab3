/**
 * Tracing for the command line's own processes. Library code never imports this file: in somebody else's gateway the
 * SDK is theirs.
 */
import { propagation, trace, type TracerProvider } from '@opentelemetry/api'
import { defaultResource, detectResources, envDetector, resourceFromAttributes, type Resource } from '@opentelemetry/resources'
import { otlpConfigured, tracingDisabled, unsupportedExports } from '../../adapters/wire/otel-env.ts'
import { VERSION } from '../../adapters/wire/version.ts'
import { ATTR } from '../../adapters/wire/semconv.ts'
import { originOfResource } from './store-processor.ts'
import { StorePropagator, StoreTracerProvider } from './store-tracer.ts'
import type { TraceStore } from '../traces/trace-store.ts'

export interface TelemetryOptions {
  /** Gets every sampled span of this process. Without it spans are made only for an OTLP receiver. */
  readonly store: TraceStore | undefined
  /** `service.name` unless OTEL_SERVICE_NAME says otherwise. @default 'fastify-epd' */
  readonly serviceName?: string
  /** Told what is wrong with the OTEL_* variables, and when the receiver they name begins to lose spans. */
  readonly onProblem?: (message: string) => void
}

export interface Telemetry {
  /** False: OTEL_SDK_DISABLED, or another SDK was there first. */
  readonly enabled: boolean
  /** Sends what is left. Never rejects. */
  close (): Promise<void>
}

const LIMIT = /^OTEL_\w+_LIMIT$/
const OFF: Telemetry = { enabled: false, async close () {} }

/**
 * Registers a tracer provider that feeds the store. When the standard OTEL_* variables ask for more than that (an
 * OTLP/HTTP receiver by OTEL_EXPORTER_OTLP_*, a sampler, limits) it is the OpenTelemetry SDK, which follows them;
 * otherwise one that does no more than what the store needs, for a fraction of the SDK's CPU. Call it before the
 * gateway is built. A provider that is already registered (`node --import otel.mjs`) is left alone.
 */
export async function startTelemetry ({ store, serviceName = 'fastify-epd', onProblem = () => {} }: TelemetryOptions): Promise<Telemetry> {
  if (tracingDisabled() || providerRegistered()) return OFF
  const otlp = otlpConfigured()
  for (const problem of unsupportedExports()) onProblem(problem)
  if (store === undefined && !otlp) return OFF
  const resource = resourceOf(serviceName)
  const provider: TracerProvider & { shutdown?: () => Promise<void> } = store === undefined || otlp || samplingConfigured()
    ? (await import('./sdk.ts')).sdkProvider({ store, resource, otlp, onProblem })
    : new StoreTracerProvider(store, originOfResource(resource))
  trace.setGlobalTracerProvider(provider)
  // No context manager: the pipeline hands contexts on itself, nothing else is instrumented in this process, and
  // following contexts through every promise costs more than the spans do.
  propagation.setGlobalPropagator(new StorePropagator())
  return {
    enabled: true,
    async close () {
      // A receiver that is down must not turn a clean exit into a failed one.
      await provider.shutdown?.().catch(() => {})
      trace.disable()
      propagation.disable()
    }
  }
}

function providerRegistered (): boolean {
  const proxy = trace.getTracerProvider() as { getDelegate?: () => object }
  const delegate = proxy.getDelegate?.()
  return delegate !== undefined && delegate.constructor.name !== 'NoopTracerProvider'
}

function samplingConfigured (): boolean {
  return Boolean(process.env.OTEL_TRACES_SAMPLER) || Object.keys(process.env).some(name => LIMIT.test(name))
}

function resourceOf (serviceName: string): Resource {
  const ours = resourceFromAttributes({ [ATTR.serviceName]: serviceName, [ATTR.serviceVersion]: VERSION })
  return defaultResource().merge(ours).merge(detectResources({ detectors: [envDetector] }))
}
