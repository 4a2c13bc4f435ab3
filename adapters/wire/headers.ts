/** HTTP headers between the gateway and engines. */

/** Names the call in the logs of both ends and for POST /abort_request. */
export const REQUEST_ID_HEADER = 'x-request-id'

/** Gateways that a call has passed, each by the id it drew at its start: a request that meets its own went in a ring. */
export const GATEWAY_HEADER = 'x-epd-gateway'

/** To an encoder or P: engine id of the node that will pull what this request leaves. */
export const CONSUMER_HEADER = 'x-epd-consumer'

/** To an encoder: it may offer the consumer each item as soon as its blocks are chosen. `<id>:<n>,<n>...`: which items of the consumer's request these are. */
export const OVERLAP_HEADER = 'x-epd-overlap'

/** To P or PD: the request comes later, under the same id, when encoders have its media. */
export const AHEAD_HEADER = 'x-epd-ahead'

/** Marks a request that is sent again: the engine ends the leases of its first answer, which the gateway has not read. */
export const AGAIN_HEADER = 'x-epd-again'

/** In the answer to a registration: bearer token with which the engine sends its spans. */
export const NODE_TOKEN_HEADER = 'x-epd-node-token'

/** Marks the gateway's calls to P and D: LMDeploy refuses control fields without it, because a client could have sent them (InternLM/lmdeploy#4969). */
export const PROXY_HEADERS: Readonly<Record<string, string>> = { 'x-lmdeploy-distserve-proxy': '1' }

/** Headers that no option forwards: they belong to one connection, say who a client is, or are the gateway's own to send. */
const OWN = /^(authorization|cookie|proxy-.*|host|connection|keep-alive|te|trailer|transfer-encoding|upgrade|expect|accept-encoding|content-.*|traceparent|tracestate|x-request-id|x-api-key|x-epd-.*|x-lmdeploy-.*)$/

export function isForwardable (name: string): boolean {
  return !OWN.test(name.toLowerCase())
}

/** Of a client's headers those of these names. */
export function chosen (headers: Readonly<Record<string, string | string[] | undefined>>, names: readonly string[]): Record<string, string> {
  return Object.fromEntries(names.flatMap(name => headers[name.toLowerCase()] === undefined ? [] : [[name.toLowerCase(), String(headers[name.toLowerCase()])]]))
}
