/** What gateway and engines read of the standard OTEL_* variables; the SDK reads the others by itself. */

/** @returns true when OTEL_SDK_DISABLED turns tracing off */
export function tracingDisabled (): boolean {
  return process.env.OTEL_SDK_DISABLED?.toLowerCase() === 'true'
}

/** Are spans to be sent to an OTLP receiver? Named exporters decide; without any, a given endpoint does. */
export function otlpConfigured (): boolean {
  const { OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_EXPORTER_OTLP_TRACES_ENDPOINT } = process.env
  const named = exporters()
  return named.length > 0 ? named.includes('otlp') : Boolean(OTEL_EXPORTER_OTLP_TRACES_ENDPOINT || OTEL_EXPORTER_OTLP_ENDPOINT)
}

/** What the variables ask for that this project lacks: spans that never arrive are easy to miss and hard to find. */
export function unsupportedExports (): string[] {
  const { OTEL_EXPORTER_OTLP_PROTOCOL, OTEL_EXPORTER_OTLP_TRACES_PROTOCOL } = process.env
  const protocol = OTEL_EXPORTER_OTLP_TRACES_PROTOCOL || OTEL_EXPORTER_OTLP_PROTOCOL
  const problems = exporters().filter(name => name !== 'otlp' && name !== 'none').map(name => `OTEL_TRACES_EXPORTER: '${name}' is not supported, only otlp and none are`)
  if (otlpConfigured() && protocol === 'grpc') problems.push('OTEL_EXPORTER_OTLP_PROTOCOL: grpc is not supported; spans are sent as http/json, which receivers take at another port (4318)')
  return problems
}

/** By the specification a comma-separated list. */
function exporters (): string[] {
  return (process.env.OTEL_TRACES_EXPORTER ?? '').split(',').map(name => name.trim()).filter(Boolean)
}
