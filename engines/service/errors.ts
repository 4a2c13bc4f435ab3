/**
 * The one error type that engines throw on purpose, and its HTTP shape. Every code is in docs/errors.md.
 */
import { openAiError, type OpenAiErrorBody } from '../../adapters/wire/openai-error.ts'

/** Code -> HTTP status. 499 is what nginx logs when a client has gone; it appears in logs only. */
export const ENGINE_ERROR_STATUS = {
  invalid_request: 400,
  unsupported: 400,
  invalid_media: 400,
  media_fetch_failed: 400,
  context_length_exceeded: 400,
  invalid_api_key: 401,
  forbidden: 403,
  model_not_found: 404,
  not_found: 404,
  not_linked: 409,
  wrong_model: 409,
  features_gone: 410,
  kv_gone: 410,
  request_too_large: 413,
  cancelled: 499,
  internal: 500,
  features_corrupt: 502,
  kv_corrupt: 502,
  busy: 503,
  draining: 503,
  initialising: 503
} as const

export type EngineErrorCode = keyof typeof ENGINE_ERROR_STATUS

export interface EngineErrorOptions {
  /** The member of the request at fault: `messages[0].content[1]`. */
  readonly param?: string | undefined
  readonly cause?: unknown
  /** Seconds, sent as `Retry-After`. `busy`, `draining` and `initialising` send 1 when none is given. */
  readonly retryAfter?: number | undefined
}

const kEngineError = Symbol.for('fastify-epd.EngineError')

/** `message` goes to the client as it stands: no file names of the server, no picture bytes, no prompts. */
export class EngineError extends Error {
  readonly [kEngineError] = true
  readonly code: EngineErrorCode
  readonly status: number
  readonly param: string | undefined
  readonly retryAfter: number | undefined

  constructor (code: EngineErrorCode, message: string, options: EngineErrorOptions = {}) {
    super(message, { cause: options.cause })
    this.name = 'EngineError'
    this.code = code
    this.status = ENGINE_ERROR_STATUS[code]
    this.param = options.param
    this.retryAfter = options.retryAfter ?? (this.status === 503 ? 1 : undefined)
  }

  static is (value: unknown): value is EngineError {
    return typeof value === 'object' && value !== null && (value as { [kEngineError]?: unknown })[kEngineError] === true
  }
}

/**
 * OpenAI's body for any thrown value. What is not an {@link EngineError} is a bug of the engine: its text stays in the
 * log, and the client reads only that the request failed.
 */
export function errorBody (err: unknown): OpenAiErrorBody {
  const { status, message, code, param } = EngineError.is(err) ? err : new EngineError('internal', 'The engine failed to serve the request.')
  return { error: openAiError(status, message, code, param) }
}

/** An event for a stream whose head has been sent: OpenAI clients read `error` from it and stop. */
export function errorEvent (err: unknown): Buffer {
  return Buffer.from('data: ' + JSON.stringify(errorBody(err)) + '\n\n')
}
