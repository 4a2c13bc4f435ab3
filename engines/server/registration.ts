import { setTimeout as delay } from 'node:timers/promises'
import { request } from 'undici'
import { Backoff } from '../../adapters/wire/backoff.ts'
import type { NodeRegistration } from '../../adapters/wire/distserve.ts'
import { ROLE_TO_WIRE } from '../../adapters/wire/roles.ts'
import { NODE_TOKEN_HEADER } from '../../adapters/wire/headers.ts'
import type { EngineLog } from '../service/engine-service.ts'

export interface RegistrationOptions {
  /** Gateway's base URL, with its prefix if it has one. */
  readonly proxyUrl: string
  /** This engine's URL: its engine id, byte for byte. */
  readonly url: string
  /** Wire integer of the role. */
  readonly role: number
  readonly models: readonly string[]
  readonly log: EngineLog
  /** First pause after a failure; doubles up to {@link longestPauseMs}. @default 250 */
  readonly firstPauseMs?: number
  /** @default 10_000 */
  readonly longestPauseMs?: number
  /** Repeats a registration that was taken, in case the gateway restarts and forgets. @default 30_000 */
  readonly repeatMs?: number
}

export interface Registration {
  /** Bearer token for sending spans to this gateway, from its last answer. */
  token (): string | undefined
  /** Register now, not at the next turn. */
  again (): void
  close (): Promise<void>
}

const FIRST_PAUSE_MS = 250
const LONGEST_PAUSE_MS = 10_000
const REPEAT_MS = 30_000
const ATTEMPT_TIMEOUT_MS = 5_000

/** LMDeploy's own proxy validates the role against an enumeration without encoders. Asking again would not teach it. */
class UnknownRoleError extends Error {
  constructor () {
    super('this proxy knows no encoders (it answered 422 to role 4, as LMDeploy\'s own proxy does): register encoders with a fastify-epd gateway; not asking again')
  }
}

/**
 * Keeps this engine registered as LMDeploy's api_server does it (`POST {proxy}/nodes/add`; only status 200 counts).
 * LMDeploy's tries once; this repeats with back-off until the gateway takes it, then every half minute.
 */
export function startRegistration (options: RegistrationOptions): Registration {
  const stop = new AbortController()
  let token: string | undefined
  let wake: AbortController | undefined

  async function run (): Promise<void> {
    const backoff = new Backoff(options.firstPauseMs ?? FIRST_PAUSE_MS, options.longestPauseMs ?? LONGEST_PAUSE_MS)
    let known = false
    while (!stop.signal.aborted) {
      try {
        token = await register(options, stop.signal) ?? token
        if (!known) options.log.info({ proxy: options.proxyUrl }, 'registered with the gateway')
        known = true
        backoff.reset()
        await sleep(options.repeatMs ?? REPEAT_MS)
      } catch (err) {
        if (stop.signal.aborted) return
        if (err instanceof UnknownRoleError) {
          options.log.error({ proxy: options.proxyUrl }, err.message)
          return
        }
        const pause = backoff.pause()
        options.log.warn({ proxy: options.proxyUrl, reason: (err as Error).message, again_in_ms: pause }, 'registration failed')
        known = false
        await sleep(pause)
      }
    }
  }

  async function sleep (ms: number): Promise<void> {
    wake = new AbortController()
    await delay(ms, undefined, { signal: AbortSignal.any([stop.signal, wake.signal]), ref: false }).catch(() => {})
  }

  const running = run()
  return {
    token: () => token,
    again: () => { wake?.abort() },
    async close () {
      stop.abort()
      await running
    }
  }
}

async function register ({ proxyUrl, url, role, models }: RegistrationOptions, signal: AbortSignal): Promise<string | undefined> {
  const registration: NodeRegistration = { url, status: { role, models } }
  const response = await request(proxyUrl.replace(/\/+$/, '') + '/nodes/add', {
    method: 'POST',
    headers: { 'content-type': 'application/json', accept: 'application/json' },
    body: JSON.stringify(registration),
    signal: AbortSignal.any([signal, AbortSignal.timeout(ATTEMPT_TIMEOUT_MS)])
  })
  const answer = (await response.body.text()).slice(0, 200)
  if (response.statusCode === 422 && role === ROLE_TO_WIRE.encoder) throw new UnknownRoleError()
  if (response.statusCode !== 200) throw new Error(`the gateway answered ${response.statusCode}: ${answer}`)
  const token = response.headers[NODE_TOKEN_HEADER]
  return typeof token === 'string' ? token : undefined
}
