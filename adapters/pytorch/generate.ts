import { AdapterError, type AdapterErrorOptions, type Call, type GenerateJob, type Handoff, type UpstreamResponse } from '../adapter.ts'
import { postStream, type UpstreamFailure } from '../http.ts'
import { isOurNode } from '../lmdeploy.ts'
import { generatePlain, refuse } from '../plain.ts'
import { PROXY_HEADERS } from './division.ts'
import { featuresGone, unfit, withFeatures } from './features.ts'
import { withTenant } from './tenant.ts'

/** The client's body with encoder results in place of pixels, or with P's migration request; with neither as it came. */
export function generate (job: GenerateJob, call: Call): Promise<UpstreamResponse> {
  const { node, body, features, handoff, tenant } = job
  if (handoff !== undefined) return migrate(job, handoff, call)
  if (features.length === 0) return generatePlain(job, call, withTenant(node, tenant))
  const reason = unfit(node, body, features)
  if (reason !== undefined) return refuse(node, reason)
  return postStream(node, { path: job.path, body: body.splice(withTenant(node, tenant, withFeatures(body, features))) }, call, featuresGone)
}

/** Codes of our engines that mean: prefill again. As with features, what is gone most often left with its link. */
const GONE: Readonly<Record<string, Pick<AdapterErrorOptions, 'unlinked'>>> = {
  kv_gone: { unlinked: true },
  kv_corrupt: {},
  not_linked: { unlinked: true },
  wrong_model: { unlinked: true }
}

/** A migration request that D will not have is no fault of the client's, who has not written it. */
function kvGone ({ node, error }: UpstreamFailure): AdapterError | undefined {
  const gone = typeof error.code === 'string' ? GONE[error.code] : undefined
  const unfit = typeof error.param === 'string' && error.param.startsWith('migration_request')
  if (gone === undefined && !unfit) return undefined
  return new AdapterError('KV_GONE', `${node.id} could not take the prompt over: ${error.message ?? error.code}`, { node: node.id, ...gone })
}

/**
 * To D: the client's body and P's migration request. D emits P's token first, so its answer is whole. Our D gets the KV
 * lease in place of each picture, as it looks at none; LMDeploy's makes its prompt again from the original body.
 */
function migrate ({ node, path, body, tenant }: GenerateJob, { wire, lease }: Handoff, call: Call): Promise<UpstreamResponse> {
  if (node.info?.accepts.some(format => format.startsWith('kv:')) !== true) return refuse(node, `${node.id} takes no migration request`)
  const set = { migration_request: JSON.stringify(wire) }
  const edits = isOurNode(node) ? { set, mediaUrls: body.media.map(() => `epd:${lease}`) } : { set }
  return postStream(node, { path, body: body.splice(withTenant(node, tenant, edits)), headers: PROXY_HEADERS }, call, kvGone)
}
