import type { AdapterNode } from '../adapter.ts'
import { errorObject, parseJson, type UpstreamErrorObject, type UpstreamFailure } from './answers.ts'
import { READ_AHEAD, type Exchange } from './exchange.ts'
import { brokenOff } from './failures.ts'

const LF = 0x0a
const CR = 0x0d
const DATA = Buffer.from('data:')

/** OpenAI's and our engines' string codes that stand for a status; numbers stand for themselves. */
const STATUS_OF_CODE: Readonly<Record<string, number>> = {
  busy: 503,
  draining: 503,
  initialising: 503,
  engine_unavailable: 503,
  rate_limit_exceeded: 429,
  internal: 500,
  internal_error: 500,
  server_error: 500,
  cancelled: 500
}

/** The first `data:` line that is whole; `undefined` when there is none yet. Comments and other fields are skipped. */
export function firstData (bytes: Buffer): Buffer | undefined {
  let start = 0
  for (;;) {
    const end = bytes.indexOf(LF, start)
    if (end < 0) return undefined
    if (bytes.compare(DATA, 0, DATA.length, start, Math.min(start + DATA.length, end)) === 0) {
      return bytes.subarray(start + DATA.length, bytes[end - 1] === CR ? end - 1 : end)
    }
    start = end + 1
  }
}

function statusOf (error: UpstreamErrorObject): number {
  const { code, type } = error
  const number = typeof code === 'number' ? code : Number(code)
  if (number >= 400 && number < 600) return number
  const named = (typeof code === 'string' ? STATUS_OF_CODE[code] : undefined) ?? (typeof type === 'string' ? STATUS_OF_CODE[type] : undefined)
  if (named !== undefined) return named
  return type === 'invalid_request_error' || type === 'BadRequestError' ? 400 : 500
}

/** An error event in place of the first event of a stream, as a failure; undefined for a good event. */
export function errorEvent (node: AdapterNode, data: Buffer): UpstreamFailure | undefined {
  // Good events of every backend start with {"id" or {"object"; "error" in the first bytes is looked at closer.
  if (data.subarray(0, 64).indexOf('error') < 0) return undefined
  const parsed = parseJson(data)
  const isError = typeof parsed === 'object' && parsed !== null && ('error' in parsed || (parsed as { object?: unknown }).object === 'error')
  const error = isError ? errorObject(parsed) : undefined
  if (error === undefined) return undefined
  const body = Buffer.from(JSON.stringify({ error }))
  return { node, statusCode: statusOf(error), contentType: 'application/json', body, error, retryAfter: undefined }
}

function isStream (response: Exchange): boolean {
  const type = response.headers['content-type']
  return typeof type === 'string' && type.startsWith('text/event-stream')
}

/** Most JSON answers come whole with their head; nothing has to be waited for then. */
export function isBegun (response: Exchange): boolean {
  return !isStream(response) && response.hasBytes
}

/** Waits for the first event of a stream, or the first bytes of another body. Gives the failure an error event stands for. */
export async function firstEvent (node: AdapterNode, response: Exchange): Promise<UpstreamFailure | undefined> {
  const streamed = isStream(response)
  let bytes = response.peek()
  for (;;) {
    if (!streamed && bytes.length > 0) return undefined
    const data = streamed ? firstData(bytes) : undefined
    if (data !== undefined) return errorEvent(node, data)
    // More is not read ahead; so long a first event is taken for a good one.
    if (bytes.length > READ_AHEAD) return undefined
    if (!(await response.more())) {
      if (!streamed) return undefined
      throw brokenOff(node, new Error('the stream ended before its first event'))
    }
    bytes = response.peek()
  }
}
