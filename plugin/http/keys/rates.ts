/** How much a key may use in a minute, counted in memory or, for several gateways, in Redis or Valkey. */
import { RateLimiterMemory, RateLimiterRedis, RateLimiterRes, type RateLimiterAbstract } from 'rate-limiter-flexible'
import type { Log } from '../../../adapters/adapter.ts'
import { epdError } from '../../errors.ts'
import type { KeyOptions, RateOptions } from '../../options/index.ts'

/** What is counted, and the option that bounds it. */
export type Kind = 'requests' | 'tokens' | 'visionTokens'

export interface Rate {
  readonly fits: boolean
  readonly limit: number
  readonly remaining: number
  /** Until the minute of these counts is over. */
  readonly resetMs: number
}

/** Where keys are counted: in this process, or together with others. */
export interface KeyCounts {
  take (key: KeyOptions, kind: Kind, amount: number): Promise<Rate | undefined>
  /** One more request at once; false when the key has as many as it may. */
  begin (key: KeyOptions): boolean | Promise<boolean>
  end (name: string): void
}

const MINUTE = 60

/** An optional peer: a name that a bundler can't resolve stays out of the bundle. */
const IOREDIS: string = 'ioredis'

type Client = import('ioredis').Redis

export class Rates {
  readonly #options: RateOptions
  readonly #log: Log
  readonly #limiters = new Map<string, RateLimiterAbstract>()
  #client: Client | undefined
  #connecting: Promise<void> | undefined

  constructor (options: RateOptions, log: Log) {
    this.#options = options
    this.#log = log
  }

  /**
   * Uses so much of what a key may use in a minute; less than 0 gives back. Undefined: the key has no such bound.
   *
   * @throws EPD_ERR_RATES_AWAY when Redis does not answer and `whenAway` is `closed`
   */
  async take ({ name, ...bounds }: KeyOptions, kind: Kind, amount: number): Promise<Rate | undefined> {
    const limit = bounds[kind]
    if (limit === undefined) return undefined
    if (this.#options.redis !== undefined) await (this.#connecting ??= this.#connect(this.#options.redis))
    const limiter = this.#limiterFor(kind, limit)
    // A Redis that is there but says nothing is away for all counts that follow, until it answers again.
    const late = setTimeout(() => { this.#client?.disconnect(true) }, this.#options.redisTimeout)
    try {
      return rateOf(true, limit, await (amount < 0 ? limiter.reward(name, -amount) : limiter.consume(name, amount)))
    } catch (err) {
      if (err instanceof RateLimiterRes) return rateOf(false, limit, err)
      throw epdError('EPD_ERR_RATES_AWAY', [], { cause: err })
    } finally {
      clearTimeout(late)
    }
  }

  close (): void {
    this.#client?.disconnect()
  }

  #limiterFor (kind: Kind, points: number): RateLimiterAbstract {
    const id = `${kind} ${points}`
    let limiter = this.#limiters.get(id)
    if (limiter === undefined) this.#limiters.set(id, limiter = this.#create({ points, duration: MINUTE, keyPrefix: `epd:${kind}` }))
    return limiter
  }

  #create (bound: { readonly points: number, readonly duration: number, readonly keyPrefix: string }): RateLimiterAbstract {
    if (this.#client === undefined) return new RateLimiterMemory(bound)
    const alone = this.#options.whenAway === 'open' ? { insuranceLimiter: new RateLimiterMemory(bound) } : {}
    return new RateLimiterRedis({ ...bound, storeClient: this.#client, rejectIfRedisNotReady: true, ...alone })
  }

  /** Waits for the first connection, no longer than a command may take. */
  async #connect (url: string): Promise<void> {
    const { redisTimeout: timeout } = this.#options
    const { Redis } = await (import(IOREDIS) as Promise<typeof import('ioredis')>)
    // No command waits for a connection, and none for ever.
    const client = new Redis(url, { enableOfflineQueue: false, maxRetriesPerRequest: 0, commandTimeout: timeout, connectTimeout: timeout, retryStrategy: tries => Math.min(100 * tries, 2_000) })
    let away = false
    client.on('error', (err: Error) => {
      if (!away) this.#log.warn({ reason: err.message, whenAway: this.#options.whenAway }, 'the counts of keys are away')
      away = true
    })
    client.on('ready', () => {
      if (away) this.#log.info({}, 'the counts of keys are back')
      away = false
    })
    this.#client = client
    await new Promise<void>(resolve => {
      const timer = setTimeout(resolve, timeout)
      client.once('ready', () => { clearTimeout(timer); resolve() }).once('close', () => { clearTimeout(timer); resolve() })
    })
  }
}

function rateOf (fits: boolean, limit: number, { remainingPoints, msBeforeNext }: RateLimiterRes): Rate {
  return { fits, limit, remaining: Math.max(0, Math.min(limit, remainingPoints)), resetMs: Math.max(0, msBeforeNext) }
}
