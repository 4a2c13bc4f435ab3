import { trace, type Attributes, type Context, type Span } from '@opentelemetry/api'
import { ENGINE_TRACER_NAME } from '../../adapters/wire/semconv.ts'
import { failSpan } from '../../adapters/wire/spans.ts'
import { toEngineError } from './media-error.ts'

/** Runs `work` under a span that ends with it, and tells of its failure. */
export async function inSpan<T> (name: string, context: Context, attributes: Attributes, work: (span: Span) => Promise<T>): Promise<T> {
  // The tracer is fetched each time: an SDK may be registered after the engine was made.
  const span = trace.getTracer(ENGINE_TRACER_NAME).startSpan(name, { attributes }, context)
  try {
    return await work(span)
  } catch (err) {
    failSpan(span, toEngineError(err, ''))
    throw err
  } finally {
    span.end()
  }
}
