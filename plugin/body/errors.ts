/** What can be wrong with a request body. The plugin maps these to OpenAI-shaped errors and to `docs/errors.md`. */
export type BodyErrorCode =
  | 'invalid_json'
  | 'invalid_utf8'
  | 'duplicate_member'
  | 'invalid_value'
  | 'missing_value'
  | 'invalid_media'
  | 'too_many_media'
  | 'body_too_large'
  | 'unsupported_content_encoding'
  | 'invalid_encoding'
  | 'client_closed'

export interface BodyErrorOptions {
  /** The offending member or part: `model`, `messages[0].content[1]`. */
  readonly param?: string | undefined
  /** Byte offset in the body, for syntax errors. */
  readonly offset?: number | undefined
  readonly cause?: unknown
}

const STATUS: Readonly<Record<BodyErrorCode, number>> = {
  invalid_json: 400,
  invalid_utf8: 400,
  duplicate_member: 400,
  invalid_value: 400,
  missing_value: 400,
  invalid_media: 400,
  too_many_media: 400,
  body_too_large: 413,
  unsupported_content_encoding: 415,
  invalid_encoding: 400,
  client_closed: 499
}

/** The only error the body modules throw on purpose. Messages never quote the body's contents. */
export class BodyError extends Error {
  readonly code: BodyErrorCode
  readonly statusCode: number
  readonly param: string | undefined
  readonly offset: number | undefined

  constructor (code: BodyErrorCode, message: string, options: BodyErrorOptions = {}) {
    super(message, { cause: options.cause })
    this.name = 'BodyError'
    this.code = code
    this.statusCode = STATUS[code]
    this.param = options.param
    this.offset = options.offset
  }
}
