/** Registered URLs: which are good, which can be dialled, and which other engines can dial. */

/** Throws TypeError with the reason when a URL can't be a node's. */
export function checkUrl (url: string): void {
  // An id goes into headers and logs byte for byte, and URL takes more than those do.
  if (!/^[\x21-\x7e]+$/.test(url)) throw new TypeError(`node url ${JSON.stringify(url)} must be of printable ASCII`)
  let parsed: URL
  try {
    parsed = new URL(url)
  } catch {
    throw new TypeError(`node url ${JSON.stringify(url)} is not a URL`)
  }
  if (parsed.protocol !== 'http:' && parsed.protocol !== 'https:') throw new TypeError(`node url ${JSON.stringify(url)} must be http or https`)
  // An id is logged and shown; a password in it would be too.
  if (parsed.username !== '' || parsed.password !== '') throw new TypeError('node url must not hold credentials; use apiKey')
  if (parsed.search !== '' || parsed.hash !== '') throw new TypeError(`node url ${JSON.stringify(url)} must have no query`)
}

/** LMDeploy's default server name registers as `http://0.0.0.0:23333`: an address to listen on, not one to dial. */
export function isUnspecified (url: string): boolean {
  const { hostname } = new URL(url)
  return hostname === '0.0.0.0' || hostname === '[::]'
}

/** Where this gateway dials a registered URL: as it is, or at its registrant's address when it names none. */
export function dialUrl (url: string, peer: string | undefined): string {
  if (!isUnspecified(url)) return url
  const parsed = new URL(url)
  const address = (peer ?? '').replace(/^::ffff:/, '').replace(/%.*$/, '')
  parsed.hostname = address === '' || address === '::1' ? '127.0.0.1' : address.includes(':') ? `[${address}]` : address
  return parsed.pathname === '/' ? parsed.origin : parsed.href
}
