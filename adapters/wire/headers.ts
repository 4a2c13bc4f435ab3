/** HTTP headers between the gateway and engines. */

/** Names the call in the logs of both ends and for POST /abort_request. */
export const REQUEST_ID_HEADER = 'x-request-id'

/** Gateways that a call has passed, each by the id it drew at its start: a request that meets its own went in a ring. */
export const GATEWAY_HEADER = 'x-epd-gateway'

/** To an encoder or P: engine id of the node that will pull what this request leaves. */
export const CONSUMER_HEADER = 'x-epd-consumer'

/** Marks a request that is sent again: the engine ends the leases of its first answer, which the gateway has not read. */
export const AGAIN_HEADER = 'x-epd-again'

/** In the answer to a registration: bearer token with which the engine sends its spans. */
export const NODE_TOKEN_HEADER = 'x-epd-node-token'

/** Marks the gateway's calls to P and D: LMDeploy refuses control fields without it, because a client could have sent them (InternLM/lmdeploy#4969). */
export const PROXY_HEADERS: Readonly<Record<string, string>> = { 'x-lmdeploy-distserve-proxy': '1' }
