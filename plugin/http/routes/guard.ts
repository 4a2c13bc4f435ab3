import { createHash, timingSafeEqual } from 'node:crypto'
import { BlockList, isIP } from 'node:net'
import type { FastifyRequest, onRequestHookHandler } from 'fastify'
import { epdError } from '../../errors.ts'

/** Is the request's bearer token one of `keys`? Compares in constant time. */
export function createKeyCheck (keys: readonly string[]): (request: FastifyRequest) => boolean {
  const hashes = keys.map(digest)
  return request => {
    const token = /^Bearer +(\S+) *$/i.exec(request.headers.authorization ?? '')?.[1]
    if (token === undefined) return false
    const hash = digest(token)
    let found = false
    for (const one of hashes) found = timingSafeEqual(one, hash) || found
    return found
  }
}

export function digest (text: string): Buffer {
  return createHash('sha256').update(text).digest()
}

/** The key as HTTP Basic password with any user name, which a browser sends after a prompt. */
function createPasswordCheck (key: string): (request: FastifyRequest) => boolean {
  const expected = digest(key)
  return request => {
    const encoded = /^Basic +([A-Za-z0-9+/=]+) *$/i.exec(request.headers.authorization ?? '')?.[1]
    if (encoded === undefined) return false
    const text = Buffer.from(encoded, 'base64').toString()
    return timingSafeEqual(expected, digest(text.slice(text.indexOf(':') + 1)))
  }
}

/** onRequest hook of the OpenAI routes: requests need one of the keys. */
export function requireKey (keys: readonly string[]): onRequestHookHandler {
  const check = createKeyCheck(keys)
  return (request, _reply, done) => { done(check(request) ? undefined : epdError('EPD_ERR_UNAUTHORIZED')) }
}

/**
 * onRequest hook of the operators' routes: lets loopback and allowed networks in, and others with the admin key. Without
 * the key a browser must name this machine by an address, because a site can resolve its name to 127.0.0.1 and add nodes
 * of its own (DNS rebinding). Engines and tools may use any name. A page of another origin changes nothing, whatever CORS
 * lets it read.
 */
export function requireOperator (options: { readonly allowedNetworks: readonly string[], readonly adminKey: string | undefined }): onRequestHookHandler {
  const networks = networksOf(options.allowedNetworks)
  const hasKey = options.adminKey === undefined ? () => false : createKeyCheck([options.adminKey])
  // A browser also sends the password with requests that another site caused, so it opens GET only.
  const hasPassword = options.adminKey === undefined ? () => false : createPasswordCheck(options.adminKey)
  return (request, _reply, done) => {
    const trusted = isLocal(request, networks) && !(fromBrowser(request) && namedByOtherSite(request)) && !fromOtherOrigin(request)
    done(trusted || hasKey(request) || (request.method === 'GET' && hasPassword(request)) ? undefined : epdError('EPD_ERR_FORBIDDEN'))
  }
}

/**
 * onRequest hook of the inspection page: needs the admin key if there is one, else loopback or an allowed network.
 * Without a key it refuses host names of other sites (DNS rebinding).
 */
export function requireViewer (options: { readonly allowedNetworks: readonly string[], readonly adminKey: string | undefined }): onRequestHookHandler {
  const networks = networksOf(options.allowedNetworks)
  if (options.adminKey === undefined) {
    return (request, _reply, done) => { done(isLocal(request, networks) && !namedByOtherSite(request) ? undefined : epdError('EPD_ERR_FORBIDDEN')) }
  }
  const hasKey = createKeyCheck([options.adminKey])
  const hasPassword = createPasswordCheck(options.adminKey)
  return (request, reply, done) => {
    if (hasKey(request) || hasPassword(request)) { done(); return }
    reply.header('www-authenticate', 'Basic realm="fastify-epd admin key", charset="UTF-8"')
    done(epdError('EPD_ERR_UNAUTHORIZED'))
  }
}

/** Recognises browsers by headers that a page's script can't remove: `Origin` of a POST, `User-Agent` of a GET. */
function fromBrowser ({ headers }: FastifyRequest): boolean {
  return headers.origin !== undefined || headers['sec-fetch-site'] !== undefined || headers['user-agent']?.startsWith('Mozilla/') === true
}

/** A request that a page of another origin has made, but for a GET, whose answer it can't read. */
function fromOtherOrigin ({ method, headers, host }: FastifyRequest): boolean {
  const { origin, 'sec-fetch-site': site } = headers
  if (origin !== undefined) return origin.replace(/^https?:\/\//, '') !== host
  return method !== 'GET' && (site === 'cross-site' || site === 'same-site')
}

function namedByOtherSite ({ hostname }: FastifyRequest): boolean {
  const name = hostname.replace(/^\[|\]$/g, '')
  return isIP(name) === 0 && name !== 'localhost' && !name.endsWith('.localhost')
}

function isLocal (request: FastifyRequest, networks: BlockList): boolean {
  // A proxy's own address is not the client's, which Fastify knows with `trustProxy` only.
  const forwarded = request.headers['x-forwarded-for'] !== undefined || request.headers.forwarded !== undefined || request.headers['x-real-ip'] !== undefined
  if (forwarded && request.ips === undefined) return false
  const ip = request.ip.replace(/^::ffff:(?=\d+\.)/i, '')
  const family = isIP(ip)
  return family !== 0 && networks.check(ip, family === 4 ? 'ipv4' : 'ipv6')
}

function networksOf (allowed: readonly string[]): BlockList {
  const list = new BlockList()
  list.addSubnet('127.0.0.0', 8, 'ipv4')
  list.addAddress('::1', 'ipv6')
  for (const network of allowed) {
    const [address, bits] = network.split('/') as [string, string?]
    const type = isIP(address) === 4 ? 'ipv4' : 'ipv6'
    if (bits === undefined) list.addAddress(address, type)
    else list.addSubnet(address, Number(bits), type)
  }
  return list
}
