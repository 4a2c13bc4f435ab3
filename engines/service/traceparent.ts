import { propagation, type Context } from '@opentelemetry/api'

/** The context as it travels between engines; undefined without an SDK. */
export function traceparentOf (context: Context): string | undefined {
  const carrier: { traceparent?: string } = {}
  propagation.inject(context, carrier)
  return carrier.traceparent
}
