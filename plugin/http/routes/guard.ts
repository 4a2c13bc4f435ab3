import { createHash, timingSafeEqual } from 'node:crypto'
import { BlockList, isIP } from 'node:net'
import type { FastifyRequest, onRequestHookHandler } from 'fastify'
import { epdError } from '../../errors.ts'

export interface Access {
  readonly allowedNetworks: readonly string[]
  readonly adminKey: string | undefined
}

/** A gateway, whose options a reload replaces. */
export interface Guarded { readonly options: Access }

/** What is made of the options, made again when they are others. */
function current<T> (guarded: Guarded, make: (options: Access) => T): () => T {
  let { options } = guarded
  let made = make(options)
  return () => {
    if (options !== guarded.options) made = make(options = guarded.options)
    return made
  }
}

/** Is the request's bearer token one of `keys`? Compares in constant time. */
export function createKeyCheck (keys: readonly string[]): (request: FastifyRequest) => boolean {
  const hashes = keys.flatMap(key => [digest(key), digest(key, 'latin1')])
  return request => {
    const token = tokenOf(request)
    if (token === undefined) return false
    const hash = digest(token, 'latin1')
    let found = false
    for (const one of hashes) found = timingSafeEqual(one, hash) || found
    return found
  }
}

/** A client's key: the bearer token or, as Anthropic's libraries send it, `x-api-key`. A character for each byte that was sent. */
export function tokenOf ({ headers }: FastifyRequest): string | undefined {
  const { authorization, 'x-api-key': key } = headers
  return /^Bearer +(\S+) *$/i.exec(authorization ?? '')?.[1] ?? (typeof key === 'string' ? key : undefined)
}

export function digest (text: string, encoding: 'utf8' | 'latin1' = 'utf8'): Buffer {
  return createHash('sha256').update(text, encoding).digest()
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

const checks = new WeakMap<readonly string[], (request: FastifyRequest) => boolean>()

/** @throws EPD_ERR_UNAUTHORIZED when the request has none of the keys */
export function checkKey (request: FastifyRequest, keys: readonly string[]): void {
  let check = checks.get(keys)
  if (check === undefined) checks.set(keys, check = createKeyCheck(keys))
  if (!check(request)) throw epdError('EPD_ERR_UNAUTHORIZED')
}

/**
 * onRequest hook of the operators' routes: lets loopback and allowed networks in, and others with the admin key. Without
 * the key a browser must name this machine by an address, because a site can resolve its name to 127.0.0.1 and add nodes
 * of its own (DNS rebinding). Engines and tools may use any name. A page of another origin changes nothing, whatever CORS
 * lets it read.
 */
export function requireOperator (guarded: Guarded): onRequestHookHandler {
  const access = current(guarded, ({ allowedNetworks, adminKey }) => ({
    networks: networksOf(allowedNetworks),
    hasKey: adminKey === undefined ? () => false : createKeyCheck([adminKey]),
    hasPassword: adminKey === undefined ? () => false : createPasswordCheck(adminKey)
  }))
  return (request, _reply, done) => {
    const { networks, hasKey, hasPassword } = access()
    // A browser also sends the password with requests that another site caused, so it opens GET only.
    const trusted = isLocal(request, networks) && !(fromBrowser(request) && namedByOtherSite(request)) && !fromOtherOrigin(request)
    done(trusted || hasKey(request) || (request.method === 'GET' && hasPassword(request)) ? undefined : epdError('EPD_ERR_FORBIDDEN'))
  }
}

/**
 * onRequest hook of the inspection page: needs the admin key if there is one, else loopback or an allowed network.
 * Without a key it refuses host names of other sites (DNS rebinding).
 */
export function requireViewer (guarded: Guarded): onRequestHookHandler {
  const access = current(guarded, ({ allowedNetworks, adminKey }) => ({
    networks: networksOf(allowedNetworks),
    key: adminKey === undefined ? undefined : [createKeyCheck([adminKey]), createPasswordCheck(adminKey)]
  }))
  return (request, reply, done) => {
    const { networks, key } = access()
    if (key === undefined) { done(isLocal(request, networks) && !namedByOtherSite(request) ? undefined : epdError('EPD_ERR_FORBIDDEN')); return }
    if (key.some(check => check(request))) { done(); return }
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
