import { trace } from '@opentelemetry/api'
import { ExportResultCode, type ExportResult } from '@opentelemetry/core'
import { defaultResource, detectResources, envDetector, resourceFromAttributes } from '@opentelemetry/resources'
import { BatchSpanProcessor, NodeTracerProvider, type ReadableSpan, type SpanExporter, type SpanProcessor } from '@opentelemetry/sdk-trace-node'
import { request } from 'undici'
import { otlpConfigured, tracingDisabled, unsupportedExports } from '../../adapters/wire/otel-env.ts'
import { otlpExporter } from '../../adapters/wire/otlp-exporter.ts'
import { ATTR, ENGINE_TRACER_NAME } from '../../adapters/wire/semconv.ts'
import { spansToJson } from './span-json.ts'
import { PROPAGATOR } from './trace-context.ts'

export interface EngineTelemetryOptions {
  /** The engine's URL, as `service.instance.id`. */
  readonly engineId: string
  readonly role: string
  readonly version: string
  /** Gateway that takes spans at `/epd/otlp/v1/traces`. */
  readonly proxyUrl?: string | undefined
  /** The token the gateway gave at registration; another one after it restarted, none before. */
  readonly token: () => string | undefined
  /** The gateway does not know the token: register again. */
  readonly onRefused: () => void
  /** Gets what is wrong with the OTEL_* variables, and a message when the receiver they name begins to lose spans. */
  readonly onProblem?: (message: string) => void
}

export interface EngineTelemetry {
  /** Sends what is left, for at most two seconds. Never rejects. */
  close (): Promise<void>
}

/** A trace is looked at right after its request, so spans leave soon; still many requests share one call. */
const SEND_AFTER_MS = 200
const SEND_TIMEOUT_MS = 2_000
const MAX_WAITING_SPANS = 4_096

/**
 * The SDK of an engine process: spans go to the gateway it registered with, and to an OTLP receiver when the standard
 * OTEL_EXPORTER_OTLP_* variables name one. Neither can block or fail a request: spans wait in a bounded queue and are
 * dropped when they can't be sent. Without either (or with OTEL_SDK_DISABLED) there is no SDK and spans cost nothing.
 *
 * No context manager is registered: engines hand contexts on explicitly, and following them through every promise
 * costs time on the path of each token.
 */
export function startEngineTelemetry (options: EngineTelemetryOptions): EngineTelemetry | undefined {
  const processors = tracingDisabled() ? [] : processorsOf(options)
  if (processors.length === 0) return undefined
  const provider = new NodeTracerProvider({ resource: resourceOf(options), spanProcessors: processors })
  provider.register({ contextManager: null, propagator: PROPAGATOR })
  return {
    async close () {
      await provider.shutdown().catch(() => {})
      trace.disable()
    }
  }
}

function processorsOf (options: EngineTelemetryOptions): SpanProcessor[] {
  const { onProblem = () => {} } = options
  const processors: SpanProcessor[] = []
  if (options.proxyUrl !== undefined) {
    processors.push(new BatchSpanProcessor(gatewayExporter(options.proxyUrl, options), {
      scheduledDelayMillis: SEND_AFTER_MS, exportTimeoutMillis: SEND_TIMEOUT_MS, maxQueueSize: MAX_WAITING_SPANS
    }))
  }
  for (const problem of unsupportedExports()) onProblem(problem)
  if (otlpConfigured()) processors.push(new BatchSpanProcessor(otlpExporter(onProblem)))
  return processors
}

/** Sends to the gateway with the present token. A failed send is no error here: its spans are lost, its requests are not. */
function gatewayExporter (proxyUrl: string, { token, onRefused }: EngineTelemetryOptions): SpanExporter {
  const url = proxyUrl.replace(/\/+$/, '') + '/epd/otlp/v1/traces'
  const sending = new Set<Promise<void>>()
  const send = async (body: string, key: string): Promise<void> => {
    const headers = { 'content-type': 'application/json', authorization: `Bearer ${key}` }
    const answer = await request(url, { method: 'POST', headers, body, signal: AbortSignal.timeout(SEND_TIMEOUT_MS) })
    await answer.body.dump()
    if (answer.statusCode === 401) onRefused()
  }
  const settled = async (): Promise<void> => { await Promise.all(sending) }
  return {
    export (spans: ReadableSpan[], done: (result: ExportResult) => void) {
      const key = token()
      if (key === undefined) { done({ code: ExportResultCode.SUCCESS }); return }
      const sent = send(spansToJson(spans), key).catch(() => {}).finally(() => {
        sending.delete(sent)
        done({ code: ExportResultCode.SUCCESS })
      })
      sending.add(sent)
    },
    forceFlush: settled,
    shutdown: settled
  }
}

function resourceOf ({ engineId, role, version }: EngineTelemetryOptions): ReturnType<typeof defaultResource> {
  const ours = resourceFromAttributes({
    [ATTR.serviceName]: ENGINE_TRACER_NAME, [ATTR.serviceVersion]: version, [ATTR.serviceInstance]: engineId, [ATTR.role]: role
  })
  // What OTEL_RESOURCE_ATTRIBUTES adds is welcome; the name and the id are how the gateway knows us.
  return defaultResource().merge(detectResources({ detectors: [envDetector] })).merge(ours)
}
