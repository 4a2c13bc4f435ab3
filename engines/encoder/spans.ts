import { SpanStatusCode, trace, type Attributes, type Context, type Span } from '@opentelemetry/api'
import { ENGINE_ATTR, ENGINE_TRACER_NAME } from '../semconv.ts'

/** Runs `work` under a span that ends with it, and tells of its failure. */
export async function inSpan<T> (name: string, context: Context, attributes: Attributes, work: (span: Span) => Promise<T>): Promise<T> {
  // The tracer is fetched each time: an SDK may be registered after the engine was made.
  const span = trace.getTracer(ENGINE_TRACER_NAME).startSpan(name, { attributes }, context)
  try {
    return await work(span)
  } catch (err) {
    span.setAttribute(ENGINE_ATTR.errorType, err instanceof Error ? err.name : 'Error')
    span.setStatus({ code: SpanStatusCode.ERROR })
    throw err
  } finally {
    span.end()
  }
}
