import { format } from 'node:util'
import { AdapterError, type UpstreamResponse } from '../adapters/adapter.ts'
import { openAiError, type OpenAiError } from '../adapters/wire/openai-error.ts'

interface Row {
  readonly message: string
  readonly statusCode: number
  /** `error.code` as clients see it. */
  readonly code: string
  /** The client may try again, after `Retry-After`. */
  readonly again?: boolean
  /** The client's library must not try again by itself: OpenAI's heed `x-should-retry`. */
  readonly never?: boolean
}

/** Every error that clients of the gateway can see, by its code in logs and spans. docs/errors.md explains each. */
export const ERRORS = {
  EPD_ERR_INVALID_BODY: { message: '%s', statusCode: 400, code: 'invalid_body' },
  EPD_ERR_INVALID_JSON: { message: '%s', statusCode: 400, code: 'invalid_json' },
  EPD_ERR_INVALID_UTF8: { message: 'The request body is not valid UTF-8 at byte %s', statusCode: 400, code: 'invalid_utf8' },
  EPD_ERR_INVALID_ENCODING: { message: 'The request body could not be decoded: it is not what its content-encoding says', statusCode: 400, code: 'invalid_encoding' },
  EPD_ERR_INVALID_VALUE: { message: '%s', statusCode: 400, code: 'invalid_value' },
  EPD_ERR_MISSING_VALUE: { message: '%s is required', statusCode: 400, code: 'missing_value' },
  EPD_ERR_DUPLICATE_MEMBER: { message: 'The request body has %s twice', statusCode: 400, code: 'duplicate_member' },
  EPD_ERR_INVALID_MEDIA: { message: '%s', statusCode: 400, code: 'invalid_media' },
  EPD_ERR_TOO_MANY_MEDIA: { message: 'The request has more than %s media items', statusCode: 400, code: 'too_many_media' },
  EPD_ERR_INVALID_PATH: { message: 'The path %s has a segment "." or "..", or is encoded more than five times', statusCode: 400, code: 'invalid_path' },
  EPD_ERR_CONFIGURATION: { message: '%s', statusCode: 400, code: 'invalid_configuration' },
  EPD_ERR_NO_HYBRID: { message: '%s can not be served: it needs a node that does both prefill and decode, and the model %s has none', statusCode: 400, code: 'unsupported_value' },
  EPD_ERR_CONTEXT_LENGTH: { message: 'The request is too long: the nodes of the model %s take %s', statusCode: 400, code: 'context_length_exceeded' },
  EPD_ERR_UNAUTHORIZED: { message: 'Incorrect API key provided', statusCode: 401, code: 'invalid_api_key' },
  EPD_ERR_FORBIDDEN: { message: 'This route answers loopback and allowed networks only; others need the admin key', statusCode: 403, code: 'forbidden' },
  EPD_ERR_MODEL_NOT_FOUND: { message: 'The model %s does not exist', statusCode: 404, code: 'model_not_found' },
  EPD_ERR_UNKNOWN_NODE: { message: 'No node is registered as %s', statusCode: 404, code: 'node_not_found' },
  EPD_ERR_NO_ROUTE: { message: 'There is no route %s %s; base URLs of OpenAI clients end in /v1', statusCode: 404, code: 'not_found' },
  EPD_ERR_BODY_TOO_LARGE: { message: 'The request body is larger than %s bytes', statusCode: 413, code: 'body_too_large' },
  EPD_ERR_MEDIA_TYPE: { message: 'The request body must be application/json', statusCode: 415, code: 'unsupported_media_type' },
  EPD_ERR_CONTENT_ENCODING: { message: 'This content-encoding is not taken here: send the request body without one', statusCode: 415, code: 'unsupported_content_encoding' },
  EPD_ERR_OVERLOADED: { message: 'Too many pictures are being processed; try again later', statusCode: 429, code: 'rate_limit_exceeded', again: true },
  EPD_ERR_RATE: { message: 'The key %s may have no more than %s; try again later', statusCode: 429, code: 'rate_limit_exceeded', again: true },
  EPD_ERR_CLIENT_CLOSED_REQUEST: { message: 'The client closed the connection', statusCode: 499, code: 'client_closed' },
  EPD_ERR_INTERNAL: { message: 'The gateway failed', statusCode: 500, code: 'internal_error' },
  EPD_ERR_RATES_AWAY: { message: 'The gateway can not see what this key has used; try again later', statusCode: 503, code: 'rate_limits_away', again: true },
  EPD_ERR_NO_NODE: { message: 'No healthy node serves the model %s', statusCode: 503, code: 'no_healthy_node', again: true },
  EPD_ERR_NO_ENCODER: { message: 'No encoder can take the pictures of this request, and no healthy node of the model %s encodes by itself', statusCode: 503, code: 'no_encoder', again: true },
  EPD_ERR_ENCODE_FAILED: { message: 'Encoding media failed on every encoder', statusCode: 503, code: 'encode_failed', again: true },
  EPD_ERR_UPSTREAM_FAILED: { message: 'The model server failed before it answered', statusCode: 503, code: 'upstream_failed', again: true },
  EPD_ERR_NODE_DIED: { message: 'The model server went down while it had this request, which is given to no other one', statusCode: 502, code: 'node_died', never: true },
  EPD_ERR_UPSTREAM_BROKEN: { message: 'The model server broke off in the middle of its answer', statusCode: 502, code: 'upstream_broken' },
  EPD_ERR_UPSTREAM_BUSY: { message: 'The model servers are full; try again later', statusCode: 503, code: 'upstream_busy', again: true },
  EPD_ERR_FEATURES_GONE: { message: 'Encoded media were lost before they could be used', statusCode: 503, code: 'features_gone', again: true },
  EPD_ERR_KV_GONE: { message: 'The prefilled prompt was lost before it could be used', statusCode: 503, code: 'kv_gone', again: true },
  EPD_ERR_LINK_REFUSED: { message: 'The nodes of this model can not work together', statusCode: 503, code: 'link_refused' },
  EPD_ERR_UPSTREAM_TIMEOUT: { message: 'The model server did not answer in time', statusCode: 504, code: 'upstream_timeout', again: true },
  EPD_ERR_LOOP: { message: 'The request has passed this gateway before: its nodes form a ring', statusCode: 508, code: 'loop_detected' },
  EPD_ERR_DEADLINE: { message: 'The request took longer than its deadline before the answer began', statusCode: 504, code: 'deadline_exceeded' },
  EPD_ERR_CLOSING: { message: 'The gateway is shutting down', statusCode: 503, code: 'gateway_closing', again: true }
} as const satisfies Record<string, Row>

export type EpdErrorCode = keyof typeof ERRORS

export interface EpdErrorDetails {
  readonly cause?: unknown
  /** Seconds, for `Retry-After`. */
  readonly retryAfter?: number | undefined
  /** The member of the request at fault: `model`, `messages[0].content[1]`. */
  readonly param?: string | undefined
}

/** An error of the table. */
export class EpdError extends Error {
  override readonly name = 'EpdError'
  readonly code: EpdErrorCode
  readonly statusCode: number
  /** `error.code` as clients see it. */
  readonly clientCode: string
  readonly retryAfter: number | undefined
  readonly param: string | undefined

  /** @param args fill the `%s` of the row's message */
  constructor (code: EpdErrorCode, args: readonly unknown[], { cause, retryAfter, param }: EpdErrorDetails) {
    const row = ERRORS[code]
    super(format(row.message, ...args), cause === undefined ? {} : { cause })
    this.code = code
    this.statusCode = row.statusCode
    this.clientCode = row.code
    this.retryAfter = retryAfter
    this.param = param
  }

  /** The same error, with seconds for `Retry-After`. */
  withRetryAfter (seconds: number): EpdError {
    return Object.assign(Object.create(EpdError.prototype) as EpdError, this, { message: this.message, stack: this.stack, cause: this.cause, retryAfter: seconds })
  }
}

/** Makes an error of the table. `args` fill the `%s` of its message. */
export function epdError (code: EpdErrorCode, args: readonly unknown[] = [], details: EpdErrorDetails = {}): EpdError {
  return new EpdError(code, args, details)
}

export function isEpdError (value: unknown): value is EpdError {
  return value instanceof EpdError
}

export interface OptionsProblem {
  /** JSON pointer of the offending value; of an unknown option, its own. */
  readonly instancePath: string
  /** Names the path, the bound and the value. */
  readonly message: string
}

/** The options do not fit their schema. `register` and `resolveOptions` throw it. */
export class OptionsError extends TypeError {
  readonly code = 'EPD_ERR_OPTIONS'
  readonly problems: readonly OptionsProblem[]

  constructor (problems: readonly OptionsProblem[]) {
    super(`Invalid options: ${problems.map(problem => problem.message).join('; ')}`)
    this.problems = problems
  }
}

export class AlreadyRegisteredError extends Error {
  readonly code = 'EPD_ERR_ALREADY_REGISTERED'

  constructor () {
    super('fastify-epd is already registered here; register it once, before the routes that use it')
  }
}

/** An answer to a client: OpenAI's error shape, or what a node has answered. */
export interface ErrorReply {
  readonly statusCode: number
  readonly contentType: string
  readonly body: string | Buffer
  readonly headers: Readonly<Record<string, string>>
  /** Of a node's answer: its headers, of which those pass that are the client's. */
  readonly nodeHeaders?: UpstreamResponse['headers'] | undefined
  /** The error of our table; undefined for a node's own answer. */
  readonly error: EpdError | undefined
}

/** The error of the table for anything that can be thrown. */
export function toEpdError (error: unknown): EpdError {
  if (isEpdError(error)) return error
  if (AdapterError.is(error)) return fromAdapter(error)
  const { statusCode, code, message } = (typeof error === 'object' && error !== null ? error : {}) as { statusCode?: number, code?: string, message?: string }
  if (statusCode === 415) return epdError('EPD_ERR_MEDIA_TYPE', [], { cause: error })
  // Fastify's own errors about a request, such as FST_ERR_CTP_EMPTY_JSON_BODY.
  if (statusCode === 400 && code?.startsWith('FST_') === true) return epdError('EPD_ERR_INVALID_BODY', [message], { cause: error })
  return epdError('EPD_ERR_INTERNAL', [], { cause: error })
}

function fromAdapter (error: AdapterError): EpdError {
  const details = { cause: error, retryAfter: error.retryAfter }
  switch (error.code) {
    case 'UNAVAILABLE': return epdError(error.how === 'late' ? 'EPD_ERR_UPSTREAM_TIMEOUT' : 'EPD_ERR_UPSTREAM_FAILED', [], details)
    case 'BUSY': return epdError('EPD_ERR_UPSTREAM_BUSY', [], details)
    case 'REFUSED': return epdError('EPD_ERR_LINK_REFUSED', [], details)
    case 'FEATURES_GONE': return epdError('EPD_ERR_FEATURES_GONE', [], details)
    case 'KV_GONE': return epdError('EPD_ERR_KV_GONE', [], details)
    case 'REJECTED': return epdError('EPD_ERR_UPSTREAM_FAILED', [], details)
  }
}

/** The error as clients see it. It never names nodes; the log has the details. */
export function clientError (error: unknown): OpenAiError {
  const found = toEpdError(error)
  return openAiError(found.statusCode, found.message, found.clientCode, found.param)
}

const DEFAULT_RETRY_AFTER = 1
const NO_RETRY = { 'x-should-retry': 'false' }

export function toReply (error: unknown): ErrorReply {
  if (AdapterError.is(error) && error.response !== undefined) {
    const { statusCode, contentType, body, headers } = error.response
    return { statusCode, contentType, body, headers: {}, nodeHeaders: headers, error: undefined }
  }
  const found = toEpdError(error)
  const row: Row = ERRORS[found.code]
  return {
    statusCode: found.statusCode,
    contentType: 'application/json; charset=utf-8',
    body: JSON.stringify({ error: clientError(found) }),
    headers: row.again === true ? { 'retry-after': String(Math.ceil(found.retryAfter ?? DEFAULT_RETRY_AFTER)) } : row.never === true ? NO_RETRY : {},
    error: found
  }
}

/** Was the request wrong, or refused on purpose? Then nothing is broken. */
export function isRefusal (error: unknown): boolean {
  return toReply(error).statusCode < 500
}
