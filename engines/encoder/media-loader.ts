import { constants } from 'node:fs'
import { lookup as dnsLookup, type LookupAddress } from 'node:dns'
import { open, realpath } from 'node:fs/promises'
import { isIP, type LookupFunction, BlockList } from 'node:net'
import { sep } from 'node:path'
import { fileURLToPath } from 'node:url'
import { Agent, request, type Dispatcher } from 'undici'
import type { MediaPolicy } from '../service/engine-options.ts'
import { decodeBase64, decodeDataUrl } from './data-url.ts'
import { MediaError } from './media-error.ts'
import type { MediaSource } from './media-parts.ts'

/** Gets the bytes of a media item, wherever they lie. Fetching is where a request could make us reach what its sender can't. */

export interface MediaLoaderOptions {
  readonly policy: MediaPolicy
  /** Largest media item, bytes. @default 33554432 */
  readonly maxBytes?: number
  /** For one fetch with its redirects, milliseconds. @default 10000 */
  readonly timeoutMs?: number
  /** DNS, replaceable for tests. */
  readonly lookup?: typeof dnsLookup
}

const DEFAULT_MAX_BYTES = 32 * 1024 * 1024
const DEFAULT_TIMEOUT_MS = 10_000
const MAX_REDIRECTS = 3
const REDIRECTS = new Set([301, 302, 303, 307, 308])
/** A type that says "no picture" before the body is read; servers that state none, or octet-stream, are believed by the bytes. */
const REFUSED_TYPE = /^(text|audio|video|multipart|message|font)\/|^application\/(json|xml|javascript|pdf|xhtml\+xml)|^image\/svg/i
const REFUSED_ADDRESS = 'its host is not allowed: it is, or leads to, a private or reserved address'
const kRefused = 'ERR_MEDIA_ADDRESS_REFUSED'

export class MediaLoader {
  readonly #policy: MediaPolicy
  readonly #maxBytes: number
  readonly #timeoutMs: number
  readonly #agent: Agent
  readonly #lookup: typeof dnsLookup

  constructor (options: MediaLoaderOptions) {
    this.#policy = options.policy
    this.#maxBytes = options.maxBytes ?? DEFAULT_MAX_BYTES
    this.#timeoutMs = options.timeoutMs ?? DEFAULT_TIMEOUT_MS
    this.#lookup = options.lookup ?? dnsLookup
    // Checking inside the connection's own lookup is what pins it: the address that was checked is the one dialled.
    this.#agent = new Agent({
      connect: { lookup: this.#guardedLookup, timeout: Math.min(5_000, this.#timeoutMs) }, connections: 64, keepAliveTimeout: 4_000, maxResponseSize: this.#maxBytes
    })
  }

  /** @throws MediaError, or the signal's reason. */
  async load (source: MediaSource, signal: AbortSignal): Promise<Buffer> {
    switch (source.kind) {
      case 'data': return this.#limited(decodeDataUrl(source.url))
      case 'base64': return this.#limited(decodeBase64(source.text))
      case 'http': return await this.#fetch(source.url, signal)
      case 'file': return await this.#readFile(source.url)
      case 'epd': throw new MediaError('invalid_media', 'epd: URLs are not taken from clients')
    }
  }

  async close (): Promise<void> {
    await this.#agent.destroy()
  }

  #limited (bytes: Buffer): Buffer {
    if (bytes.length > this.#maxBytes) throw new MediaError('invalid_media', `the picture is larger than ${this.#maxBytes} bytes`)
    return bytes
  }

  /** A host the operator named may be private: naming it was the permission. */
  #mayBePrivate (host: string): boolean {
    return this.#policy.allowPrivate || this.#policy.allowedDomains.includes(host)
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
    if (!URL.canParse(String(text), base?.href)) throw new MediaError('media_fetch_failed', 'the media URL is not valid')
    const url = new URL(text, base)
    if (url.protocol !== 'http:' && url.protocol !== 'https:') throw new MediaError('media_fetch_failed', 'the media URL leads to a scheme other than http and https')
    if (url.username !== '' || url.password !== '') throw new MediaError('media_fetch_failed', 'the media URL must not carry credentials')
    const host = url.hostname.replace(/^\[|\]$/g, '').replace(/\.$/, '').toLowerCase()
    const { allowedDomains } = this.#policy
    if (allowedDomains.length > 0 && !allowedDomains.includes(host)) {
      throw new MediaError('media_fetch_failed', 'the media URL can\'t be fetched: its host is not one of the allowed domains')
    }
    // No lookup happens for a literal address, so it is checked here.
    if (isIP(host) !== 0 && !this.#mayBePrivate(host) && !isPublicAddress(host)) throw new MediaError('media_fetch_failed', `the media URL can't be fetched: ${REFUSED_ADDRESS}`)
    return url
  }

  async #fetch (text: string, signal: AbortSignal): Promise<Buffer> {
    const timeout = AbortSignal.timeout(this.#timeoutMs)
    const either = AbortSignal.any([signal, timeout])
    try {
      let url = this.#check(text)
      for (let redirects = 0; ; redirects++) {
        const response = await request(url, {
          dispatcher: this.#agent, signal: either, headersTimeout: this.#timeoutMs, bodyTimeout: this.#timeoutMs, headers: { accept: 'image/*', 'user-agent': 'fastify-epd' }
        })
        const { location } = response.headers
        if (!REDIRECTS.has(response.statusCode) || typeof location !== 'string') return await this.#body(response)
        await response.body.dump({ limit: 16_384 }).catch(() => {})
        if (redirects === MAX_REDIRECTS) throw new MediaError('media_fetch_failed', `the media URL redirects more than ${MAX_REDIRECTS} times`)
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
    else if (length > this.#maxBytes) refused = `it is larger than ${this.#maxBytes} bytes`
    if (refused !== undefined) {
      body.on('error', () => {}).destroy()
      throw new MediaError('media_fetch_failed', `the media URL can't be fetched: ${refused}`)
    }
    const chunks: Buffer[] = []
    let total = 0
    for await (const chunk of body as AsyncIterable<Buffer>) {
      total += chunk.length
      // Breaking off destroys the body, and with it the connection.
      if (total > this.#maxBytes) throw new MediaError('media_fetch_failed', `the media URL can't be fetched: it is larger than ${this.#maxBytes} bytes`)
      chunks.push(chunk)
    }
    if (total === 0) throw new MediaError('media_fetch_failed', 'the media URL gave no bytes')
    return Buffer.concat(chunks, total)
  }

  #fetchError (err: unknown, timedOut: boolean): MediaError {
    if (err instanceof MediaError) return err
    const { code } = err as { code?: unknown }
    let reason = 'the connection failed'
    if (code === kRefused) reason = REFUSED_ADDRESS
    else if (timedOut || /TIMEOUT/.test(String(code))) reason = `it took longer than ${this.#timeoutMs} ms`
    else if (code === 'ENOTFOUND' || code === 'EAI_AGAIN') reason = 'its host is unknown'
    else if (code === 'UND_ERR_RES_EXCEEDED_MAX_SIZE') reason = `it is larger than ${this.#maxBytes} bytes`
    return new MediaError('media_fetch_failed', `the media URL can't be fetched: ${reason}`, { cause: err })
  }

  async #readFile (text: string): Promise<Buffer> {
    const { directory } = this.#policy
    if (directory === undefined) throw new MediaError('invalid_media', 'file: URLs are not allowed')
    // One message for "outside", "not there" and "not a file": which it is would reveal what is on our disk.
    const refusal = new MediaError('invalid_media', 'the file is not in the folder media may come from, or can\'t be read')
    let path: string
    try {
      const [root, real] = await Promise.all([realpath(directory), realpath(fileURLToPath(text))])
      if (!real.startsWith(root.endsWith(sep) ? root : root + sep)) throw refusal
      path = real
    } catch {
      throw refusal
    }
    // The path is resolved; NOFOLLOW refuses a link put in its place meanwhile, NONBLOCK a pipe.
    const file = await open(path, constants.O_RDONLY | constants.O_NOFOLLOW | constants.O_NONBLOCK).catch(() => { throw refusal })
    try {
      const stat = await file.stat()
      if (!stat.isFile()) throw refusal
      if (stat.size > this.#maxBytes) throw new MediaError('invalid_media', `the picture is larger than ${this.#maxBytes} bytes`)
      return await file.readFile()
    } finally {
      await file.close()
    }
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
