/** OpenAI's error body, which the gateway and engines answer, and `error` events of streams carry. */

export type OpenAiErrorType = 'invalid_request_error' | 'authentication_error' | 'permission_error' | 'rate_limit_error' | 'server_error'

export interface OpenAiError {
  readonly message: string
  readonly type: OpenAiErrorType
  readonly code: string | null
  /** The member of the request at fault: `messages[0].content[1]`. */
  readonly param: string | null
}

export interface OpenAiErrorBody {
  readonly error: OpenAiError
}

/** OpenAI's `type` for an HTTP status. */
export function errorTypeOf (statusCode: number): OpenAiErrorType {
  if (statusCode >= 500) return 'server_error'
  if (statusCode === 401) return 'authentication_error'
  if (statusCode === 403) return 'permission_error'
  return statusCode === 429 ? 'rate_limit_error' : 'invalid_request_error'
}

export function openAiError (statusCode: number, message: string, code: string | null, param: string | null = null): OpenAiError {
  return { message, type: errorTypeOf(statusCode), code, param }
}
