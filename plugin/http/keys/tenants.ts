/** Named keys: who asks, what they may use, and what they have used. */
import type { FastifyReply, FastifyRequest } from 'fastify'
import type { Body } from '../../body/index.ts'
import { epdError, isEpdError } from '../../errors.ts'
import type { Gateway } from '../../gateway.ts'
import type { KeyOptions } from '../../options/index.ts'
import type { Served } from '../../pipeline/index.ts'
import { promptTokens, visionTokens } from '../../planning/index.ts'
import { onClosed } from '../client.ts'
import { kHolder, kWatches, type Held, type Watch, type Watched } from '../handle.ts'
import { createKeyCheck, digest, tokenOf } from '../routes/guard.ts'
import type { KeyCounts, Kind, Rate, Rates } from './rates.ts'

/** As in the headers of OpenAI's API: `x-ratelimit-limit-requests`. */
const HEADERS: Readonly<Record<Kind, string>> = { requests: 'requests', tokens: 'tokens', visionTokens: 'vision-tokens' }
const WORDS: Readonly<Record<Kind, string>> = { requests: 'requests', tokens: 'tokens', visionTokens: 'vision tokens' }

export class Tenants {
  readonly #gateway: Gateway
  readonly #counts: KeyCounts
  readonly #inFlight = new Map<string, number>()
  readonly #own: KeyCounts = {
    take: async (key, kind, amount) => {
      // Loaded where a key has a bound.
      this.#rates ??= import('./rates.ts').then(({ Rates }) => new Rates(this.#gateway.options.rates, this.#gateway.log))
      return await (await this.#rates).take(key, kind, amount)
    },
    begin: ({ name, concurrency }) => {
      const busy = this.#inFlight.get(name) ?? 0
      if (concurrency !== undefined && busy >= concurrency) return false
      this.#inFlight.set(name, busy + 1)
      return true
    },
    end: name => { this.#inFlight.set(name, this.#inFlight.get(name)! - 1) }
  }

  /** By the hash of the key: the time of a look-up by hash gives nothing away. */
  #byHash = new Map<string, KeyOptions>()
  #keys: readonly KeyOptions[] | undefined
  #rates: Promise<Rates> | undefined

  /** @param counts where keys are counted; by default here */
  constructor (gateway: Gateway, counts?: KeyCounts) {
    this.#gateway = gateway
    this.#counts = counts ?? this.#own
  }

  /**
   * Lets a request in, or refuses it. Whoever asks with a named key is on the request from here on, and its models, tokens
   * and end are watched.
   */
  async admit (request: FastifyRequest & Watched & Held, reply: FastifyReply): Promise<void> {
    const key = this.#keyOf(request)
    if (key === undefined) {
      const { apiKeys } = this.#gateway.options
      if (apiKeys.length > 0 && createKeyCheck(apiKeys)(request)) return
      throw epdError('EPD_ERR_UNAUTHORIZED')
    }
    const { name, priority = 0, models } = key
    request[kHolder] = { name, priority, models }
    if (request.method !== 'POST') return
    await this.#enter(key, reply)
    const watch: Watch = {
      began: async body => { await this.#charge(key, body, reply) },
      ended: (served, body) => { this.#settle(key, served, body) }
    }
    request[kWatches] = [...request[kWatches] ?? [], watch]
    await this.#take(key, 'requests', 1, reply)
  }

  async close (): Promise<void> {
    (await this.#rates)?.close()
  }

  #keyOf (request: FastifyRequest): KeyOptions | undefined {
    const { keys } = this.#gateway.options
    if (keys !== this.#keys) {
      this.#keys = keys
      this.#byHash = new Map(keys.map(key => [key.hash.toLowerCase(), key]))
    }
    const token = tokenOf(request)
    return token === undefined ? undefined : this.#byHash.get(`sha256:${digest(token, 'latin1').toString('hex')}`)
  }

  /** Bounds how many requests of a key are served at once. */
  async #enter (key: KeyOptions, reply: FastifyReply): Promise<void> {
    const counts = this.#counts
    let [held, left] = [false, false]
    const leave = (): void => {
      left = true
      if (!held) return
      held = false
      counts.end(key.name)
    }
    onClosed(reply.raw, leave)
    held = await counts.begin(key)
    if (!held) {
      this.#count(key.name, 'refused')
      throw epdError('EPD_ERR_RATE', [key.name, `${key.concurrency} requests at once`], { retryAfter: 1 })
    }
    // Its client may have left in the meantime.
    if (left) leave()
  }

  /** What a request will use is known when its body is there; of its answer's tokens, nothing. */
  async #charge (key: KeyOptions, body: Body, reply: FastifyReply): Promise<void> {
    // As for a model that is not there: who may not use it need not know of it.
    if (key.models?.includes(body.model) === false) throw epdError('EPD_ERR_MODEL_NOT_FOUND', [body.model], { param: 'model' })
    const [vision, tokens] = [visionTokens(body), promptTokens(body)]
    if (vision > 0) await this.#take(key, 'visionTokens', vision, reply)
    try {
      await this.#take(key, 'tokens', tokens, reply)
    } catch (err) {
      if (vision > 0) await this.#giveBack(key, 'visionTokens', vision)
      throw err
    }
  }

  async #take (key: KeyOptions, kind: Kind, amount: number, reply: FastifyReply): Promise<void> {
    const rate = await this.#ratesThere(key, kind, amount)
    if (rate === undefined) return
    reply.headers(headersOf(kind, rate))
    if (rate.fits) return
    this.#count(key.name, 'refused')
    // Requests that are refused count, as everywhere; tokens that are not used do not.
    if (kind !== 'requests') await this.#giveBack(key, kind, amount)
    throw epdError('EPD_ERR_RATE', [key.name, `${rate.limit} ${WORDS[kind]} a minute`], { retryAfter: Math.max(1, Math.ceil(rate.resetMs / 1_000)) })
  }

  async #giveBack (key: KeyOptions, kind: Kind, amount: number): Promise<void> {
    // Redis may be away by now: then there is nothing to give it back to.
    await this.#ratesThere(key, kind, -amount).catch(() => undefined)
  }

  async #ratesThere (key: KeyOptions, kind: Kind, amount: number): Promise<Rate | undefined> {
    if (key[kind] === undefined) return undefined
    return await this.#counts.take(key, kind, amount)
  }

  /** The request is over: its estimate becomes what the answer says it has used. */
  #settle (key: KeyOptions, { delivery, error, plan }: Served, body: Body): void {
    const usage = delivery?.closing().usage
    const estimated = promptTokens(body)
    const spent = usage === undefined ? undefined : (usage.promptTokens ?? estimated) + (usage.completionTokens ?? 0)
    const refused = isEpdError(error) && error.code === 'EPD_ERR_RATE'
    if (spent !== undefined && spent !== estimated) this.#gateway.requests.background(this.#ratesThere(key, 'tokens', spent - estimated))
    if (!refused) this.#count(key.name, delivery?.outcome === 'complete' && delivery.statusCode < 400 ? 'ok' : delivery?.outcome === 'client_gone' ? 'aborted' : 'error')
    // Without a plan the model may be a client's invention.
    if (delivery === undefined || plan === undefined) return
    const { keyTokens } = this.#gateway.stats
    keyTokens.add(usage?.promptTokens ?? estimated, key.name, 'input', body.model)
    if (usage?.completionTokens !== undefined) keyTokens.add(usage.completionTokens, key.name, 'output', body.model)
    const vision = visionTokens(body)
    if (vision > 0) keyTokens.add(vision, key.name, 'vision', body.model)
  }

  #count (name: string, outcome: 'ok' | 'refused' | 'aborted' | 'error'): void {
    this.#gateway.stats.keyRequests.add(1, name, outcome)
  }
}

function headersOf (kind: Kind, { limit, remaining, resetMs }: Rate): Record<string, string> {
  const name = HEADERS[kind]
  return { [`x-ratelimit-limit-${name}`]: String(limit), [`x-ratelimit-remaining-${name}`]: String(remaining), [`x-ratelimit-reset-${name}`]: `${Math.ceil(resetMs / 1_000)}s` }
}
