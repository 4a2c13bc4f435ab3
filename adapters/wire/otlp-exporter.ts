import { ExportResultCode } from '@opentelemetry/core'
import type { SpanExporter } from '@opentelemetry/sdk-trace-node'

/**
 * Sends spans to the OTLP/HTTP receiver that the OTEL_EXPORTER_OTLP_* variables name.
 *
 * @param onProblem gets one message when the receiver begins to lose spans; the SDK drops them silently
 */
export function otlpExporter (onProblem: (message: string) => void): SpanExporter {
  // Loaded here, so that a start without a receiver does not pay for it (80 ms CPU).
  const loaded = import('@opentelemetry/exporter-trace-otlp-http').then(({ OTLPTraceExporter }) => new OTLPTraceExporter())
  // Also before the first span: a rejection without a handler would end the process.
  loaded.catch((error: Error) => { onProblem(`spans can't be sent to an OTLP receiver: ${error.message}`) })
  let losing = false
  return {
    export (...[spans, done]: Parameters<SpanExporter['export']>) {
      loaded.then(exporter => {
        exporter.export(spans, result => {
          const lost = result.code === ExportResultCode.FAILED
          if (lost && !losing) onProblem(`spans could not be sent to the OTLP receiver: ${result.error?.message ?? 'it refused them'}`)
          losing = lost
          done(result)
        })
      }, (error: Error) => { done({ code: ExportResultCode.FAILED, error }) })
    },
    shutdown: async () => { await (await loaded).shutdown() },
    forceFlush: async () => { await (await loaded).forceFlush() }
  }
}
