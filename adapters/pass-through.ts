import { AdapterError, type AdapterNode, type BodyEdits, type Call, type GenerateJob, type UpstreamResponse } from './adapter.ts'
import { postStream } from './http.ts'

/**
 * Passes the client's body on without disaggregation, its control fields removed.
 * Throws REFUSED before media goes to a node that would drop it or fail on it.
 */
export function passThrough (job: GenerateJob, call: Call, edits: BodyEdits = {}): Promise<UpstreamResponse> {
  const { node, path, body, features, handoff } = job
  if (features.length > 0) return refuse(node, `${node.id} takes no encoder results`)
  if (handoff !== undefined) return refuse(node, `${node.id} takes no migration request`)
  if (isBlind(job)) return refuse(node, `${node.id} has no vision weights: media would be lost`)
  return postStream(node, { path, body: body.splice(edits) }, call)
}

/** Has the request media, and the node no vision weights? */
export function isBlind ({ node, body }: GenerateJob): boolean {
  const vision = node.vision ?? node.info?.vision
  return body.media.length > 0 && vision !== undefined && vision !== 'full'
}

/** Rejects with REFUSED: the node does not speak what it was asked for. */
export function refuse (node: AdapterNode, reason: string): Promise<never> {
  return Promise.reject(new AdapterError('REFUSED', reason, { node: node.id }))
}
