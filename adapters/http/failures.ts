import { AdapterError, type AdapterNode } from '../adapter.ts'

const REASONS: Readonly<Record<string, string>> = {
  ECONNREFUSED: 'refuses connections',
  ECONNRESET: 'broke the connection off',
  EPIPE: 'broke the connection off',
  UND_ERR_SOCKET: 'broke the connection off',
  ENOTFOUND: 'has a host name that does not resolve',
  EHOSTUNREACH: 'is not reachable',
  ENETUNREACH: 'is not reachable',
  UND_ERR_CONNECT_TIMEOUT: 'did not accept a connection in time',
  ETIMEDOUT: 'did not accept a connection in time',
  UND_ERR_HEADERS_TIMEOUT: 'did not answer in time',
  UND_ERR_BODY_TIMEOUT: 'stopped sending'
}

export function codeOf (error: unknown): string | undefined {
  const code = (error as { code?: unknown } | undefined)?.code
  return typeof code === 'string' ? code : undefined
}

/** No head came. */
export function unavailable (node: AdapterNode, cause: Error): AdapterError {
  const code = codeOf(cause)
  const reason = (code !== undefined ? REASONS[code] : undefined) ?? `can't be reached: ${cause.message}`
  return new AdapterError('UNAVAILABLE', `${node.id} ${reason}`, { node: node.id, cause })
}

/** The head came, the whole body did not. */
export function brokenOff (node: AdapterNode, cause: Error): AdapterError {
  return new AdapterError('UNAVAILABLE', `${node.id} broke its answer off: ${cause.message}`, { node: node.id, cause })
}

export function timedOut (node: AdapterNode, ms: number): AdapterError {
  const cause = Object.assign(new Error(`no answer within ${ms} ms`), { code: 'ETIMEDOUT' })
  return new AdapterError('UNAVAILABLE', `${node.id} did not answer within ${ms} ms`, { node: node.id, cause })
}

/** Did the peer close a kept connection as we wrote to it? Then no byte of the request was looked at. */
export function isStaleSocket (error: unknown): boolean {
  if (!AdapterError.is(error)) return false
  const code = codeOf(error.cause)
  return code === 'ECONNRESET' || code === 'EPIPE' || code === 'UND_ERR_SOCKET'
}

/** Seconds of a Retry-After header, which is a number or a date. */
export function retryAfterOf (value: string | string[] | undefined, now = Date.now()): number | undefined {
  const text = Array.isArray(value) ? value[0] : value
  if (text === undefined) return undefined
  if (/^\d+$/.test(text.trim())) return Number(text)
  const date = Date.parse(text)
  return Number.isNaN(date) ? undefined : Math.max(0, Math.ceil((date - now) / 1000))
}
