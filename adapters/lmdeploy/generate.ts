import { AdapterError, type Call, type GenerateJob, type UpstreamResponse } from '../adapter.ts'
import { postStream, type UpstreamFailure } from '../http.ts'
import { passThrough } from '../pass-through.ts'
import { PROXY_HEADERS } from '../wire/headers.ts'

/**
 * The client's body as it came; for D with P's migration request. D makes its prompt again from the original body, so
 * it gets the media as the client sent them, and emits P's token first.
 */
export function generateLmdeploy (job: GenerateJob, call: Call): Promise<UpstreamResponse> {
  const { node, path, body, handoff } = job
  if (handoff === undefined) return passThrough(job, call)
  const edits = { set: { migration_request: JSON.stringify(handoff.wire) } }
  return postStream(node, { path, body: body.splice(edits), headers: PROXY_HEADERS }, call, migrationRefused)
}

/** A refused migration request is not the client's fault, who has not written it. */
export function migrationRefused ({ node, error }: UpstreamFailure): AdapterError | undefined {
  if (typeof error.param !== 'string' || !error.param.startsWith('migration_request')) return undefined
  return new AdapterError('KV_GONE', `${node.id} could not take the prompt over: ${error.message ?? String(error.code)}`, { node: node.id })
}
