import type { AdapterError, RequestBody } from '../adapter.ts'
import type { FailureReader, UpstreamFailure } from '../http.ts'
import { badRequest } from './guard.ts'

/** What vLLM answers with 500 when it could not fetch media: the text of the HTTP client's error, which is empty for a time-out. */
const FETCH = /^$|^Cannot connect to host |^Server disconnected|^Connection |Connector|time(d )?out|^\d{3}, message=|Name or service not known|getaddrinfo|Payload|Redirect/i

/** The engine's process is ending. */
const ENGINE_DEAD = /EngineCore|EngineDead/

/** A 500 with which the process ends: requests in flight there are lost. */
export function isEngineDead ({ error }: UpstreamFailure): boolean {
  return ENGINE_DEAD.test(error.message ?? '')
}

/** vLLM's failures, for this request. */
export function failuresOf (body: RequestBody): FailureReader {
  return failure => unreachable(failure, body)
}

/** Is a 500 about an address in the request? Then it is the client's fault, and the server is well. */
function unreachable (failure: UpstreamFailure, { media }: RequestBody): AdapterError | undefined {
  const { node, statusCode, error } = failure
  const remote = media.filter(item => item.remote)
  const message = error.message ?? ''
  if (statusCode !== 500 || remote.length === 0 || error.type !== 'InternalServerError' || isEngineDead(failure) || !FETCH.test(message)) return undefined
  const [first] = remote
  const param = remote.length === 1 ? first!.path : 'messages'
  return badRequest(node, `${param}: the model server could not fetch the media`, param, 'media_unreachable')
}
