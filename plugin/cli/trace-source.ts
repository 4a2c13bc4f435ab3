import { request } from 'undici'

export interface TraceSource {
  /** Base URL of the gateway, with its prefix, without a slash at its end. */
  readonly url: string
  readonly adminKey?: string | undefined
}

/** The gateway is down, or a proxy in front of it reports so. */
export class UnreachableError extends Error {}

const CALL_TIMEOUT_MS = 5_000
/** What a proxy answers while the gateway restarts. */
const AWAY = [502, 503, 504]

/**
 * Reads one of a gateway's `/epd/traces` routes.
 *
 * @returns undefined for 404
 * @throws UnreachableError when nothing answers; Error when the server refuses, keeps no traces or is not a gateway
 */
export async function read<T extends object> (source: TraceSource, path: string): Promise<T | undefined> {
  const { status, text } = await call(source, path).catch((err: NodeJS.ErrnoException) => {
    const why = err.name === 'TimeoutError' ? `no answer within ${CALL_TIMEOUT_MS / 1_000} s` : err.code ?? err.message
    throw new UnreachableError(`can't reach the gateway at ${source.url} (${why})`, { cause: err })
  })
  if (status === 404) {
    const reason = whyOff(text)
    if (reason !== undefined) throw new Error(reason)
    return undefined
  }
  const refusal = `the gateway answered ${status}: ${text.slice(0, 300)}`
  if (AWAY.includes(status)) throw new UnreachableError(refusal)
  if (status !== 200) throw new Error(refusal)
  return parse<T>(source, text)
}

export function noTraces ({ url }: TraceSource): Error {
  return new Error(`${url} keeps no traces: it is not a fastify-epd gateway, or its traces are switched off`)
}

async function call ({ url, adminKey }: TraceSource, path: string): Promise<{ status: number, text: string }> {
  const { statusCode, body } = await request(url + path, {
    headers: adminKey === undefined ? {} : { authorization: `Bearer ${adminKey}` },
    signal: AbortSignal.timeout(CALL_TIMEOUT_MS)
  })
  return { status: statusCode, text: await body.text() }
}

/** The gateway's own words when its tracing is off. */
function whyOff (text: string): string | undefined {
  try {
    const { error } = JSON.parse(text) as { error?: { code?: unknown, message?: unknown } }
    return error?.code === 'tracing_off' ? String(error.message) : undefined
  } catch {
    return undefined
  }
}

function parse<T extends object> (source: TraceSource, text: string): T {
  const answer: unknown = (() => { try { return JSON.parse(text) } catch { return undefined } })()
  if (typeof answer !== 'object' || answer === null || !('traces' in answer || 'spans' in answer)) throw noTraces(source)
  return answer as T
}
