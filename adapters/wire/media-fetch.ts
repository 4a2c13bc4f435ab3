/** Fetches media behind URLs that clients send: where a request could make a server reach what its sender can't. */
import { lookup as dnsLookup, type LookupAddress } from 'node:dns'
import { isIP, type LookupFunction, BlockList } from 'node:net'
import { Agent, request, type Dispatcher } from 'undici'

export interface MediaFetcherOptions {
  readonly policy: {
    /** Fetch URLs that resolve to private, loopback or link-local addresses. */
    readonly allowPrivate: boolean
    /** Exact host names that media may come from; empty: any public host. */
    readonly allowedDomains: readonly string[]
  }
  /** Largest media item, bytes. */
  readonly maxBytes: number
  /** For one fetch with its redirects, milliseconds. */
  readonly timeoutMs: number
  /** DNS, replaceable for tests. */
  readonly lookup?: typeof dnsLookup | undefined
}

/** The media can't be had; the message goes to the client. */
export class MediaFetchError extends Error {
  override readonly name = 'MediaFetchError'
}

const MAX_REDIRECTS = 3
const REDIRECTS = new Set([301, 302, 303, 307, 308])
/** A type that says "no picture" before the body is read; servers that state none, or octet-stream, are believed by the bytes. */
const REFUSED_TYPE = /^(text|audio|video|multipart|message|font)\/|^application\/(json|xml|javascript|pdf|xhtml\+xml)|^image\/svg/i
const REFUSED_ADDRESS = 'its host is not allowed: it is, or leads to, a private or reserved address'
const kRefused = 'ERR_MEDIA_ADDRESS_REFUSED'

export class MediaFetcher {
  readonly #options: MediaFetcherOptions
  readonly #agent: Agent
  readonly #lookup: typeof dnsLookup

  constructor (options: MediaFetcherOptions) {
    this.#options = options
    this.#lookup = options.lookup ?? dnsLookup
    const { timeoutMs, maxBytes } = options
    // Checking inside the connection's own lookup is what pins it: the address that was checked is the one dialled.
    this.#agent = new Agent({
      connect: { lookup: this.#guardedLookup, timeout: Math.min(5_000, timeoutMs) }, connections: 64, keepAliveTimeout: 4_000, maxResponseSize: maxBytes
    })
  }

  async close (): Promise<void> {
    await this.#agent.destroy()
  }

  /** A host the operator named may be private: naming it was the permission. */
  #mayBePrivate (host: string): boolean {
    return this.#options.policy.allowPrivate || this.#options.policy.allowedDomains.includes(host)
  }

  readonly #guardedLookup: LookupFunction = (hostname, options, callback) => {
    this.#lookup(hostname, { ...options, all: true }, (err, found) => {
      const addresses = found as unknown as LookupAddress[]
      if (err !== null) return callback(err, '', 0)
      if (!this.#mayBePrivate(hostname.toLowerCase()) && !addresses.every(a => isPublicAddress(a.address))) {
        return callback(Object.assign(new Error(REFUSED_ADDRESS), { code: kRefused }), '', 0)
      }
      const [first] = addresses
      if (first === undefined) return callback(Object.assign(new Error('no address'), { code: 'ENOTFOUND' }), '', 0)
      if (options.all === true) callback(null, addresses)
      else callback(null, first.address, first.family)
    })
  }

  #check (text: string | URL, base?: URL): URL {
    if (!URL.canParse(String(text), base?.href)) throw new MediaFetchError('the media URL is not valid')
    const url = new URL(text, base)
    if (url.protocol !== 'http:' && url.protocol !== 'https:') throw new MediaFetchError('the media URL leads to a scheme other than http and https')
    if (url.username !== '' || url.password !== '') throw new MediaFetchError('the media URL must not carry credentials')
    const host = url.hostname.replace(/^\[|\]$/g, '').replace(/\.$/, '').toLowerCase()
    const { allowedDomains } = this.#options.policy
    if (allowedDomains.length > 0 && !allowedDomains.includes(host)) {
      throw new MediaFetchError('the media URL can\'t be fetched: its host is not one of the allowed domains')
    }
    // No lookup happens for a literal address, so it is checked here.
    if (isIP(host) !== 0 && !this.#mayBePrivate(host) && !isPublicAddress(host)) throw new MediaFetchError(`the media URL can't be fetched: ${REFUSED_ADDRESS}`)
    return url
  }

  /** @throws MediaFetchError, or the signal's reason. */
  async fetch (text: string, signal: AbortSignal): Promise<Buffer> {
    const timeout = AbortSignal.timeout(this.#options.timeoutMs)
    const either = AbortSignal.any([signal, timeout])
    try {
      let url = this.#check(text)
      for (let redirects = 0; ; redirects++) {
        const response = await request(url, {
          dispatcher: this.#agent, signal: either, headersTimeout: this.#options.timeoutMs, bodyTimeout: this.#options.timeoutMs, headers: { accept: 'image/*', 'user-agent': 'fastify-epd' }
        })
        const { location } = response.headers
        if (!REDIRECTS.has(response.statusCode) || typeof location !== 'string') return await this.#body(response)
        await response.body.dump({ limit: 16_384 }).catch(() => {})
        if (redirects === MAX_REDIRECTS) throw new MediaFetchError(`the media URL redirects more than ${MAX_REDIRECTS} times`)
        url = this.#check(location, url)
      }
    } catch (err) {
      if (signal.aborted) throw signal.reason
      throw this.#fetchError(err, timeout.aborted)
    }
  }

  async #body (response: Dispatcher.ResponseData): Promise<Buffer> {
    const { statusCode, headers, body } = response
    const type = String(headers['content-type'] ?? '')
    const length = Number(headers['content-length'] ?? 0)
    let refused: string | undefined
    if (statusCode !== 200) refused = `its server answered ${statusCode}`
    else if (REFUSED_TYPE.test(type)) refused = `its server says it is ${type.slice(0, 60)}, not a picture`
    else if (length > this.#options.maxBytes) refused = `it is larger than ${this.#options.maxBytes} bytes`
    if (refused !== undefined) {
      body.on('error', () => {}).destroy()
      throw new MediaFetchError(`the media URL can't be fetched: ${refused}`)
    }
    const chunks: Buffer[] = []
    let total = 0
    for await (const chunk of body as AsyncIterable<Buffer>) {
      total += chunk.length
      // Breaking off destroys the body, and with it the connection.
      if (total > this.#options.maxBytes) throw new MediaFetchError(`the media URL can't be fetched: it is larger than ${this.#options.maxBytes} bytes`)
      chunks.push(chunk)
    }
    if (total === 0) throw new MediaFetchError('the media URL gave no bytes')
    return Buffer.concat(chunks, total)
  }

  #fetchError (err: unknown, timedOut: boolean): MediaFetchError {
    if (err instanceof MediaFetchError) return err
    const { code } = err as { code?: unknown }
    let reason = 'the connection failed'
    if (code === kRefused) reason = REFUSED_ADDRESS
    else if (timedOut || /TIMEOUT/.test(String(code))) reason = `it took longer than ${this.#options.timeoutMs} ms`
    else if (code === 'ENOTFOUND' || code === 'EAI_AGAIN') reason = 'its host is unknown'
    else if (code === 'UND_ERR_RES_EXCEEDED_MAX_SIZE') reason = `it is larger than ${this.#options.maxBytes} bytes`
    return new MediaFetchError(`the media URL can't be fetched: ${reason}`, { cause: err })
  }
}

/** Which addresses media may be fetched from: public unicast ones, and nothing an attacker could reach only through us. */

/** IANA special-purpose ranges that are not global unicast. */
const PRIVATE_V4 = [
  '0.0.0.0/8', '10.0.0.0/8', '100.64.0.0/10', '127.0.0.0/8', '169.254.0.0/16', '172.16.0.0/12', '192.0.0.0/24', '192.0.2.0/24',
  '192.88.99.0/24', '192.168.0.0/16', '198.18.0.0/15', '198.51.100.0/24', '203.0.113.0/24', '224.0.0.0/4', '240.0.0.0/4'
]
/** Inside 2000::/3, where all global unicast addresses are: documentation, Teredo, ORCHID, and 6to4, which embeds any IPv4 address. */
const PRIVATE_V6 = ['2001::/23', '2001:db8::/32', '2002::/16', '3fff::/20']

const blocked = new BlockList()
const globalV6 = new BlockList()
for (const range of PRIVATE_V4) blocked.addSubnet(...split(range), 'ipv4')
for (const range of PRIVATE_V6) blocked.addSubnet(...split(range), 'ipv6')
globalV6.addSubnet('2000::', 3, 'ipv6')

function split (range: string): [string, number] {
  const [address = '', bits] = range.split('/')
  return [address, Number(bits)]
}

/** Is this literal address a public one? IPv4 addresses within IPv6 ones (mapped, NAT64) are not in 2000::/3 and so are not. */
export function isPublicAddress (address: string): boolean {
  const family = isIP(address)
  if (family === 4) return !blocked.check(address, 'ipv4')
  return family === 6 && globalV6.check(address, 'ipv6') && !blocked.check(address, 'ipv6')
}
