import { AdapterError, type Call, type Handoff, type PrefillJob } from '../adapter.ts'
import { requestOk, type UpstreamFailure } from '../http.ts'
import { isOurNode } from '../lmdeploy.ts'
import { refuse } from '../plain.ts'
import { SENT_AGAIN } from './abort.ts'
import { CHAT, prefillEdits, PROXY_HEADERS } from './division.ts'
import { featuresGone, unfit, withFeatures } from './features.ts'
import { prefillLmdeploy } from './prefill-lmdeploy.ts'
import { withTenant } from './tenant.ts'

/** POST {P}/v1/...: resolves when P has computed the prompt; the KV blocks are then under a lease of D's. */
export async function prefill (job: PrefillJob, call: Call): Promise<{ handoff: Handoff, settled: Promise<void> }> {
  const { node, body, features } = job
  if (node.info?.produces.some(format => format.startsWith('kv:')) !== true) return await refuse(node, `${node.id} hands no KV blocks on`)
  const reason = unfit(node, body, features)
  if (reason !== undefined) throw new AdapterError('KV_GONE', reason, { node: node.id, singleNode: true })
  const handoff = await (isOurNode(node) ? prefillOurs(job, call) : prefillLmdeploy(job, call))
  return { handoff, settled: Promise.resolve() }
}

interface Migration {
  readonly lease?: unknown
  readonly remote_session_id?: unknown
  readonly remote_block_ids?: unknown
  readonly token_ids?: unknown
  readonly cached_tokens?: unknown
}

function failureOf (failure: UpstreamFailure): AdapterError | undefined {
  const { node, error } = failure
  // Control fields are the gateway's: a P that refuses them is none.
  if (error.param === 'preserve_cache' || error.param === 'with_cache') return new AdapterError('REFUSED', `${node.id} is no prefill engine: ${error.message}`, { node: node.id })
  return featuresGone(failure)
}

/** D takes the migration request as P has written it. Safe to send twice, as the second try ends what was answered to the first. */
async function prefillOurs (job: PrefillJob, call: Call): Promise<Handoff> {
  const { node, decode, body, features, tenant, path = CHAT } = job
  const own = prefillEdits(body, path)
  const encoded = withFeatures(body, features)
  const answer = await requestOk(node, {
    method: 'POST',
    path,
    slices: body.splice(withTenant(node, tenant, { ...own, ...encoded, set: { ...own.set, ...encoded.set } })),
    headers: { ...PROXY_HEADERS, 'x-epd-consumer': decode.id },
    idempotent: SENT_AGAIN,
    timeout: 0
  }, call, failureOf)
  const migration = (answer as { migration_request?: Migration }).migration_request
  if (typeof migration?.lease !== 'string' || !Array.isArray(migration.remote_block_ids)) {
    throw new AdapterError('UNAVAILABLE', `${node.id} answered a prefill without a migration request`, { node: node.id })
  }
  const { token_ids: tokens, cached_tokens: cached } = migration
  return {
    node: node.id,
    lease: migration.lease,
    wire: migration,
    tokens: Array.isArray(tokens) ? tokens.length : undefined,
    cached: typeof cached === 'number' ? cached : undefined
  }
}
