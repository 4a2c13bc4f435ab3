/** What the commands ask a running gateway. */
import { request } from 'undici'
import { readWhole } from '../../adapters/http/failures.ts'
import { headerValue, httpUrl, UsageError } from './usage.ts'

export interface GatewayAddress {
  /** Base URL of the gateway, with its prefix, without a slash at its end. */
  readonly url: string
  readonly adminKey?: string | undefined
}

/** The gateway is down, or a proxy in front of it reports so. */
export class UnreachableError extends Error {}

export interface GatewayAnswer { readonly status: number, readonly text: string }

export const GATEWAY_FLAGS = {
  url: { type: 'string', default: 'http://127.0.0.1:8000' },
  'admin-key': { type: 'string' }
} as const

export const GATEWAY_HELP = `  --url URL          gateway (default: http://127.0.0.1:8000)
  --admin-key KEY    sent as bearer token, when the gateway asks for one (or environment EPD_ADMIN_KEY)
`

const CALL_TIMEOUT_MS = 5_000
/** A gateway's 1,000 traces have some megabytes. */
const MAX_BYTES = 64 * 1024 * 1024
/** What a proxy answers while the gateway restarts. */
const AWAY = [502, 503, 504]

/** @throws UsageError */
export function addressOf (values: { readonly url: string, readonly 'admin-key'?: string | undefined }): GatewayAddress {
  const url = httpUrl('--url', values.url)
  const { username, password } = new URL(url)
  if (username + password !== '') throw new UsageError('--url must not hold a password: --admin-key gives the key')
  const [flag, key] = values['admin-key'] === undefined ? ['EPD_ADMIN_KEY', process.env.EPD_ADMIN_KEY] : ['--admin-key', values['admin-key']]
  return { url, adminKey: key === undefined ? undefined : headerValue(flag, key) }
}

/**
 * One request to the gateway; with `json` a POST.
 *
 * @throws UnreachableError when nothing answers, or only a proxy
 */
export async function ask ({ url, adminKey }: GatewayAddress, path: string, json?: object): Promise<GatewayAnswer> {
  const answer = await request(url + path, {
    ...(json === undefined ? {} : { method: 'POST', body: JSON.stringify(json) }),
    headers: { ...(json === undefined ? {} : { 'content-type': 'application/json' }), ...(adminKey === undefined ? {} : { authorization: `Bearer ${adminKey}` }) },
    signal: AbortSignal.timeout(CALL_TIMEOUT_MS)
  }).then(async ({ statusCode, body }) => ({ status: statusCode, bytes: await readWhole(body, MAX_BYTES) })).catch((err: NodeJS.ErrnoException) => {
    const why = err.name === 'TimeoutError' ? `no answer within ${CALL_TIMEOUT_MS / 1_000} s` : err.code ?? err.message
    throw new UnreachableError(`can't reach the gateway at ${url} (${why})`, { cause: err })
  })
  if (answer.bytes === undefined) throw new Error(`${url} is not a fastify-epd gateway: its answer to ${path.split('?', 1)[0]} has no end`)
  const read = { status: answer.status, text: answer.bytes.toString() }
  if (AWAY.includes(read.status)) throw new UnreachableError(refusal(read))
  return read
}

/** An answer that is no error, as JSON. What it is must still be checked: another server may stand at the URL. */
export async function askJson (gateway: GatewayAddress, path: string, json?: object): Promise<unknown> {
  const answer = await ask(gateway, path, json)
  if (answer.status !== 200) throw new Error(refusal(answer))
  const value = jsonOf(answer.text)
  if (value === undefined) throw new Error(`${gateway.url} is not a fastify-epd gateway: it answered ${path} with ${answer.text.slice(0, 100) || 'nothing'}`)
  return value
}

/** In the gateway's own words, with what to do where a key is missing. */
export function refusal ({ status, text }: GatewayAnswer): string {
  const { error } = (jsonOf(text) ?? {}) as { error?: { message?: unknown } | null }
  const message = typeof error?.message === 'string' ? error.message : text.slice(0, 300)
  return `the gateway answered ${status}: ${message}${status === 401 || status === 403 ? ' (--admin-key KEY or the environment variable EPD_ADMIN_KEY gives the key)' : ''}`
}

export function jsonOf (text: string): unknown {
  try {
    return JSON.parse(text)
  } catch {
    return undefined
  }
}
