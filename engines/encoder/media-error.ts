import { trace, type Attributes, type Context, type Span } from '@opentelemetry/api'
import { CacheError } from '../cache/index.ts'
import { EngineError, type EngineErrorCode } from '../service/errors.ts'
import { ENGINE_TRACER_NAME } from '../../adapters/wire/semconv.ts'
import { failSpan } from '../../adapters/wire/spans.ts'

/** A media item can't be used. The engine adds which one; the message goes to the client. */
export class MediaError extends Error {
  override readonly name = 'MediaError'
  readonly code: EngineErrorCode

  constructor (code: 'invalid_media' | 'media_fetch_failed', message: string, options?: { cause?: unknown }) {
    super(message, options)
    this.code = code
  }
}

/** What went wrong with one item, as an EngineError naming it where the request or the load is to blame. */
export function toEngineError (reason: unknown, param: string): unknown {
  if (reason instanceof MediaError) return new EngineError(reason.code, reason.message, { param, cause: reason })
  if (reason instanceof CacheError) {
    return reason.code === 'TOO_LARGE'
      ? new EngineError('invalid_media', `the picture needs more room than this engine has: ${reason.message}`, { param, cause: reason })
      : new EngineError('busy', 'no room for the features of this picture yet', { param, cause: reason, retryAfter: 1 })
  }
  // Errors of the preprocessing worker come by name: classes do not cross threads.
  if (reason instanceof Error && reason.name === 'PictureError') return new EngineError('invalid_media', reason.message, { param, cause: reason })
  return reason
}

/** Runs `work` under a span that ends with it and records its failure. */
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
