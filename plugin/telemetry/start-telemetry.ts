/**
 * Tracing for the command line's own processes. Library code never imports this file: in somebody else's gateway the
 * SDK is theirs.
 */
import { propagation, trace, type TracerProvider } from '@opentelemetry/api'
import { defaultResource, detectResources, envDetector, resourceFromAttributes, type Resource } from '@opentelemetry/resources'
import { VERSION } from '../version.ts'
import { ATTR } from './semconv.ts'
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
  if (process.env.OTEL_SDK_DISABLED?.toLowerCase() === 'true' || providerRegistered()) return OFF
  const otlp = otlpConfigured()
  for (const problem of unsupported(otlp)) onProblem(problem)
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

/** Named exporters, as the specification has them: a list; without one, whatever an endpoint is given for. */
function exporters (): string[] {
  return (process.env.OTEL_TRACES_EXPORTER ?? '').split(',').map(name => name.trim()).filter(Boolean)
}

function otlpConfigured (): boolean {
  const { OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_EXPORTER_OTLP_TRACES_ENDPOINT } = process.env
  const named = exporters()
  return named.length > 0 ? named.includes('otlp') : Boolean(OTEL_EXPORTER_OTLP_TRACES_ENDPOINT || OTEL_EXPORTER_OTLP_ENDPOINT)
}

function samplingConfigured (): boolean {
  return Boolean(process.env.OTEL_TRACES_SAMPLER) || Object.keys(process.env).some(name => LIMIT.test(name))
}

/** What is asked for and not there: spans that never arrive are easy to miss and hard to find. */
function unsupported (otlp: boolean): string[] {
  const { OTEL_EXPORTER_OTLP_PROTOCOL, OTEL_EXPORTER_OTLP_TRACES_PROTOCOL } = process.env
  const protocol = OTEL_EXPORTER_OTLP_TRACES_PROTOCOL || OTEL_EXPORTER_OTLP_PROTOCOL
  const problems = exporters().filter(name => name !== 'otlp' && name !== 'none').map(name => `OTEL_TRACES_EXPORTER: '${name}' is not supported, only otlp and none are`)
  if (otlp && protocol === 'grpc') problems.push('OTEL_EXPORTER_OTLP_PROTOCOL: grpc is not supported; spans are sent as http/json, which receivers take at another port (4318)')
  return problems
}

function resourceOf (serviceName: string): Resource {
  const ours = resourceFromAttributes({ [ATTR.serviceName]: serviceName, [ATTR.serviceVersion]: VERSION })
  return defaultResource().merge(ours).merge(detectResources({ detectors: [envDetector] }))
}
