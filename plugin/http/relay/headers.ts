import type { OutgoingHttpHeaders } from 'node:http'

type UpstreamHeaders = Readonly<Record<string, string | string[]>>

/** Headers of one hop (RFC 9110, section 7.6.1), and those that are the gateway's own to send. */
const NOT_PASSED: ReadonlySet<string> = new Set([
  'connection', 'keep-alive', 'proxy-connection', 'proxy-authenticate', 'proxy-authorization', 'proxy-authentication-info', 'te', 'trailer',
  'transfer-encoding', 'upgrade', 'date', 'server', 'alt-svc', 'strict-transport-security'
])

/**
 * Headers of the answer to the client: the upstream's without those of the hop, under those already set on the reply
 * (CORS, rate limit), under `extra`. A node's own CORS headers are left out: who may read answers is the gateway's to say.
 */
export function answerHeaders (
  upstream: UpstreamHeaders, own: Readonly<OutgoingHttpHeaders>, extra: Readonly<Record<string, string>> | undefined
): OutgoingHttpHeaders {
  const headers: OutgoingHttpHeaders = {}
  const dropped = namedByConnection(upstream.connection)
  for (const name in upstream) {
    if (NOT_PASSED.has(name) || name.startsWith('access-control-') || dropped?.has(name)) continue
    headers[name] = upstream[name]
  }
  // Of two framings only one can be right (RFC 9112, section 6.3), and it is not the length.
  if (upstream['transfer-encoding'] !== undefined) delete headers['content-length']
  if (isEventStream(upstream)) {
    headers['cache-control'] ??= 'no-cache'
    // nginx in front would collect events otherwise.
    headers['x-accel-buffering'] ??= 'no'
    delete headers['content-length']
  }
  for (const name in own) {
    // The reply's idea of these is of another body.
    if (own[name] !== undefined && name !== 'content-length' && name !== 'content-type' && name !== 'transfer-encoding') headers[name] = own[name]
  }
  for (const name in extra) headers[name] = extra[name]
  return headers
}

export function isEventStream (headers: UpstreamHeaders): boolean {
  const type = headers['content-type']
  return typeof type === 'string' && /^text\/event-stream\b/i.test(type)
}

/** Length of the body when the upstream said it; undefined for chunked and event streams. */
export function knownLength (headers: OutgoingHttpHeaders): number | undefined {
  const text = headers['content-length']
  return typeof text === 'string' && /^\d+$/.test(text) ? Number(text) : undefined
}

function namedByConnection (value: string | string[] | undefined): Set<string> | undefined {
  if (value === undefined) return undefined
  const text = Array.isArray(value) ? value.join() : value
  const names = text.toLowerCase().split(',').map(name => name.trim())
  return new Set(names)
}
