import type { Call, GenerateJob, Handoff, UpstreamResponse } from '../adapter.ts'
import { postStream } from '../http.ts'
import { passThrough } from '../pass-through.ts'
import { PROXY_HEADERS } from '../wire/headers.ts'
import { LEASE_SCHEME } from '../wire/results.ts'
import { inOrder, withFeatures, withTenant } from './edits.ts'
import { featuresGone, kvGone } from './gone.ts'

/** The client's body with encoder results in place of pixels, or with P's migration request; with neither as it came. */
export function generateEpd (job: GenerateJob, call: Call): Promise<UpstreamResponse> {
  const { node, path, body, features, handoff, tenant } = job
  if (handoff !== undefined) return takeOver(job, handoff, call)
  if (features.length === 0) return passThrough(job, call, withTenant(tenant))
  return postStream(node, { path, body: body.splice(withTenant(tenant, withFeatures(body, features))) }, call, failure => featuresGone(failure, inOrder(features)))
}

/** To D: the client's body and P's migration request, with the KV lease in place of each media URL. D looks at no media, and emits P's token first. */
function takeOver ({ node, path, body, tenant }: GenerateJob, { wire, lease }: Handoff, call: Call): Promise<UpstreamResponse> {
  const edits = { set: { migration_request: JSON.stringify(wire) }, mediaUrls: body.media.map(() => LEASE_SCHEME + lease) }
  return postStream(node, { path, body: body.splice(withTenant(tenant, edits)), headers: PROXY_HEADERS }, call, kvGone)
}
