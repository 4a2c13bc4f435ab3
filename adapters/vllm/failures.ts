import type { AdapterError, AdapterNode, MediaItem, RequestBody } from '../adapter.ts'
import type { FailureReader, UpstreamFailure } from '../http.ts'
import { badRequest } from './guard.ts'

/** What vLLM answers with 500 when it could not fetch media: the text of the HTTP client's error, which is empty for a time-out. */
const FETCH = /^$|^Cannot connect to host |^Server disconnected|^Connection |Connector|time(d )?out|^\d{3}, message=|Name or service not known|getaddrinfo|Payload|Redirect|^Cannot load local files/i
/** Pillow's, which vLLM does not catch. */
const BOMB = /decompression bomb/i

/** The engine's process is ending. */
const ENGINE_DEAD = /EngineCore|EngineDead/

/** A 500 with which the process ends: requests in flight there are lost. */
export function isEngineDead ({ error }: UpstreamFailure): boolean {
  return ENGINE_DEAD.test(error.message ?? '')
}

/** vLLM's failures, for this request. */
export function failuresOf (body: RequestBody): FailureReader {
  return failure => aboutMedia(failure, body)
}

/** Is a 500 about media of the request? Then it is the client's fault, and the server is well. */
function aboutMedia (failure: UpstreamFailure, { media }: RequestBody): AdapterError | undefined {
  const { node, statusCode, error } = failure
  const message = error.message ?? ''
  if (statusCode !== 500 || error.type !== 'InternalServerError' || isEngineDead(failure)) return undefined
  const remote = media.filter(item => item.remote)
  if (remote.length > 0 && FETCH.test(message)) return refused(node, remote, 'the model server could not fetch the media', 'media_unreachable')
  return media.length > 0 && BOMB.test(message) ? refused(node, media, 'the picture has more pixels than the model server takes', 'media_too_large') : undefined
}

function refused (node: AdapterNode, items: readonly MediaItem[], what: string, code: string): AdapterError {
  const [first] = items
  const param = items.length === 1 ? first!.path : 'messages'
  return badRequest(node, `${param}: ${what}`, param, code)
}
