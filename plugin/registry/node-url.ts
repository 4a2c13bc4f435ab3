/** The URL of a node: what it may be, which spellings are one, and where it is dialled. */

/** @throws TypeError with the reason when a URL can't be a node's */
export function checkUrl (url: string): void {
  // An id goes into headers and logs byte for byte, and URL accepts more than those do.
  if (!/^[\x21-\x7e]+$/.test(url)) throw new TypeError(`node url ${JSON.stringify(url)} must be of printable ASCII`)
  let parsed: URL
  try {
    parsed = new URL(url)
  } catch {
    throw new TypeError(`node url ${JSON.stringify(url)} is not a URL`)
  }
  if (parsed.protocol !== 'http:' && parsed.protocol !== 'https:') throw new TypeError(`node url ${JSON.stringify(url)} must be http or https`)
  // Logs and pages show ids, and would show a password in them.
  if (parsed.username !== '' || parsed.password !== '') throw new TypeError('node url must not hold credentials; use apiKey')
  if (parsed.search !== '' || parsed.hash !== '') throw new TypeError(`node url ${JSON.stringify(url)} must have no query`)
}

/** LMDeploy's default server name registers as `http://0.0.0.0:23333`: an address to listen on, not one to dial. */
export function isUnspecified (url: string): boolean {
  const { hostname } = new URL(url)
  return hostname === '0.0.0.0' || hostname === '[::]'
}

/** Where the gateway dials a registered URL: the registrant's address stands in for an unspecified host. */
export function dialUrl (url: string, peer: string | undefined): string {
  if (!isUnspecified(url)) return url
  const parsed = new URL(url)
  const address = (peer ?? '').replace(/^::ffff:/, '').replace(/%.*$/, '')
  parsed.hostname = address === '' || address === '::1' ? '127.0.0.1' : address.includes(':') ? `[${address}]` : address
  return parsed.pathname === '/' ? parsed.origin : parsed.href
}

/** Do two URLs name one node? The id of a node is the first spelling, byte for byte. */
export function sameNode (one: string, other: string): boolean {
  return one === other || plain(one) === plain(other)
}

/** The URL without what makes no difference: `/v1` and slashes at its end, capitals in its host, the default port. */
function plain (url: string): string {
  return URL.canParse(url) ? new URL(url).href.replace(/(\/v1)?\/*$/, '') : url
}
