import { ExportResultCode } from '@opentelemetry/core'
import { OTLPTraceExporter } from '@opentelemetry/exporter-trace-otlp-http'
import type { SpanExporter } from '@opentelemetry/sdk-trace-node'

/**
 * Sends spans to the OTLP/HTTP receiver that the OTEL_EXPORTER_OTLP_* variables name.
 *
 * @param onProblem gets one message when the receiver begins to lose spans; the SDK drops them silently
 */
export function otlpExporter (onProblem: (message: string) => void): SpanExporter {
  const exporter = new OTLPTraceExporter()
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
