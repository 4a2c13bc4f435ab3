import { ProxyTracerProvider, trace, type Span, type Tracer, type TracerOptions } from '@opentelemetry/api'
import type { NodeTracerProvider, ReadableSpan } from '@opentelemetry/sdk-trace-node'
import { otlpConfigured, tracingDisabled, unsupportedExports } from '../../adapters/wire/otel-env.ts'
import { SCHEMA_URL, TRACER_NAME } from '../../adapters/wire/semconv.ts'
import { EpdSpanProcessor, type TraceStore } from '../traces/store.ts'
import { VERSION } from '../../adapters/wire/version.ts'

const SCOPE: readonly [name: string, version: string, options: TracerOptions] = [TRACER_NAME, VERSION, { schemaUrl: SCHEMA_URL }]

/**
 * Who makes the spans of a gateway, and where they are kept. The application's tracer provider makes them when there is
 * one; otherwise a provider of the gateway's own does, which is not registered globally. Whichever makes a span, `keep`
 * hands it to the gateway's store when it has ended.
 */
export class Tracing {
  readonly store: TraceStore | undefined
  readonly #processor: EpdSpanProcessor | undefined
  #provider: NodeTracerProvider | undefined

  /** @param store none: spans are made only for the application's SDK or an OTLP receiver */
  constructor (store?: TraceStore) {
    this.store = store
    this.#processor = store === undefined ? undefined : new EpdSpanProcessor(store)
  }

  /**
   * Makes the gateway's own provider, unless the application has one or there is no use for spans.
   *
   * @param onProblem gets what is wrong with the OTEL_* variables, and a message when the receiver they name loses spans
   */
  async start (onProblem: (message: string) => void): Promise<void> {
    if (tracingDisabled() || applicationTracer() !== undefined) return
    for (const problem of unsupportedExports()) onProblem(problem)
    if (this.store === undefined && !otlpConfigured()) return
    // The SDK is loaded only where it is used.
    this.#provider = (await import('./own-provider.ts')).ownProvider(onProblem)
  }

  /** Asked for at each request: an application may start its SDK after it registered the plugin. */
  get tracer (): Tracer | undefined {
    return applicationTracer() ?? this.#provider?.getTracer(...SCOPE)
  }

  /** Why `GET /epd/traces` has nothing to show, now and later; undefined while traces are kept. */
  get off (): string | undefined {
    if (this.store === undefined) return 'the option telemetry.traces is false'
    if (this.tracer === undefined) return tracingDisabled() ? 'the variable OTEL_SDK_DISABLED is true' : 'tracing was not started'
    return process.env.OTEL_TRACES_SAMPLER === 'always_off' ? 'the variable OTEL_TRACES_SAMPLER is always_off' : undefined
  }

  /** Will a span be in the store once it has ended? Not when a sampler left it out, or its SDK is not OpenTelemetry's. */
  keeps (span: Span): boolean {
    return this.#processor !== undefined && isReadable(span)
  }

  /** @param span one that has ended */
  keep (span: Span): void {
    if (isReadable(span)) this.#processor?.onEnd(span)
  }

  /** Sends what is left to the OTLP receiver. Never rejects. */
  async close (): Promise<void> {
    // A receiver that is down must not turn a clean exit into a failed one.
    await this.#provider?.shutdown().catch(() => {})
  }
}

/** Undefined while the application has registered no provider: the API's proxy then stands before nothing. */
function applicationTracer (): Tracer | undefined {
  const provider = trace.getTracerProvider()
  return provider instanceof ProxyTracerProvider ? provider.getDelegateTracer(...SCOPE) : provider.getTracer(...SCOPE)
}

/** The API's spans can't be read; those that an SDK records can. */
function isReadable (span: Span | ReadableSpan): span is Span & ReadableSpan {
  return 'instrumentationScope' in span && 'startTime' in span && 'resource' in span
}
