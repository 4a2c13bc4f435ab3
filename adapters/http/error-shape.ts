/** Errors as backends spell them, in OpenAI's shape: what they say, and the status that they stand for. */
import { errorTypeOf } from '../wire/openai-error.ts'

export interface UpstreamErrorObject {
  readonly message?: string
  readonly type?: string
  readonly code?: string | number | null
  readonly param?: string | null
}

/** Longest message that is written anew; some repeat the client's whole picture. */
const MESSAGE_LIMIT = 2_000

type Members = Readonly<Record<string, unknown>>

function isMembers (value: unknown): value is Members {
  return typeof value === 'object' && value !== null && !Array.isArray(value)
}

/**
 * `{"error": {...}}` (OpenAI; Anthropic with a `type` beside it), `{"object": "error", ...}` (LMDeploy, SGLang, older vLLM),
 * `{"detail": ...}` (FastAPI), `{"error": "..."}`, `{"status": "error", "message": ...}` (SGLang's encoder), and
 * `{"response": {"error": {...}}}` (a failed event of OpenAI's Responses).
 */
export function errorObject (body: unknown): UpstreamErrorObject | undefined {
  if (!isMembers(body)) return undefined
  const { error, object, message, detail, status, type, response } = body
  if (isMembers(error)) return withStatus(error, body)
  if (typeof error === 'string' && error !== '') return withStatus({ message: typeof message === 'string' ? `${error}: ${message}` : error }, body)
  if (detail !== undefined && detail !== null) return withStatus({ ...ofDetail(detail) }, body)
  if (object === 'error' || error === true || status === 'error' || type === 'error' || typeof message === 'string') return body as UpstreamErrorObject
  return isMembers(response) && isMembers(response.error) ? response.error as UpstreamErrorObject : undefined
}

/** A status may stand beside the error in place of in it. */
function withStatus (error: Members, { code, status_code: statusCode, status }: Members): UpstreamErrorObject {
  const beside = [code, statusCode, status].find(value => isStatus(Number(value)))
  return (error.code ?? beside) === undefined || error.code !== undefined ? error as UpstreamErrorObject : { ...error, code: Number(beside) } as UpstreamErrorObject
}

/** FastAPI's `detail`: a text, or a list of what is wrong with which member. */
function ofDetail (detail: unknown): UpstreamErrorObject {
  if (typeof detail === 'string') return { message: detail }
  const faults = Array.isArray(detail) ? detail.filter(isMembers).filter(fault => typeof fault.msg === 'string') : []
  if (faults.length === 0) return (isMembers(detail) ? errorObject(detail) : undefined) ?? { message: JSON.stringify(detail) }
  const memberOf = ({ loc }: Members): string => Array.isArray(loc) ? loc.filter(step => step !== 'body').join('.') : ''
  const param = memberOf(faults[0]!)
  return { message: faults.map(fault => [memberOf(fault), fault.msg].filter(part => part !== '').join(': ')).join('; '), ...(param === '' ? {} : { param }) }
}

/** Is this an error, and nothing else? Some good answers have a member `error` that is null. */
export function isErrorBody (body: unknown): boolean {
  if (!isMembers(body)) return false
  const { error, object, type, status, detail, choices, response } = body
  if (choices !== undefined && !isMembers(error)) return false
  return (error !== undefined && error !== null && error !== false) || object === 'error' || type === 'error' || status === 'error' || detail !== undefined ||
    (isMembers(response) && isMembers(response.error)) || isFlat(body)
}

/** `{"message", "type", "code"}` without a name for it. */
function isFlat ({ message, type, code, id }: Members): boolean {
  return typeof message === 'string' && id === undefined && (typeof type === 'string' || isStatus(Number(code)))
}

/** What clients read: OpenAI's shape, with the backend's message, type, code and param where it has them. */
export function openAiShape (error: UpstreamErrorObject, statusCode: number): { readonly error: object } {
  const { message, type, code, param } = error
  return {
    error: {
      message: typeof message === 'string' && message !== '' ? shortened(message) : `the model server answered ${statusCode}`,
      type: typeof type === 'string' && type !== 'error' ? type : errorTypeOf(statusCode),
      code: code ?? null,
      param: typeof param === 'string' ? param : null
    }
  }
}

function shortened (message: string): string {
  return message.length > MESSAGE_LIMIT ? `${message.slice(0, MESSAGE_LIMIT)}...` : message
}

/** Does a body have OpenAI's shape already? */
export function hasOpenAiShape (body: unknown): boolean {
  return isMembers(body) && isMembers(body.error) && typeof body.error.message === 'string'
}

/** Statuses that a code or a type stands for: OpenAI's, Anthropic's, vLLM's, LMDeploy's, our engines'. A number stands for itself. */
const STATUS_OF: ReadonlyMap<string, number> = new Map(Object.entries({
  invalid_request_error: 400,
  badrequesterror: 400,
  context_length_exceeded: 400,
  authentication_error: 401,
  invalid_api_key: 401,
  permission_error: 403,
  permissiondeniederror: 403,
  not_found_error: 404,
  notfounderror: 404,
  model_not_found: 404,
  10400: 404,
  request_too_large: 413,
  unprocessableentityerror: 422,
  rate_limit_error: 429,
  rate_limit_exceeded: 429,
  ratelimiterror: 429,
  insufficient_quota: 429,
  busy: 503,
  draining: 503,
  initialising: 503,
  engine_unavailable: 503,
  overloaded_error: 503,
  service_unavailable: 503,
  serviceunavailableerror: 503,
  service_unavailable_error: 503,
  10401: 503,
  timeout_error: 504,
  10402: 504
}))

function isStatus (number: number): boolean {
  return Number.isInteger(number) && number >= 400 && number < 600
}

/** The status that an error stands for which came with a good one. */
export function statusOf (error: UpstreamErrorObject): number {
  const { code, type, status, status_code: statusCode } = error as UpstreamErrorObject & { status?: unknown, status_code?: unknown }
  for (const value of [code, statusCode, status, type]) if (isStatus(Number(value))) return Number(value)
  for (const value of [code, type]) {
    const named = STATUS_OF.get(String(value).toLowerCase())
    if (named !== undefined) return named
  }
  return 500
}
