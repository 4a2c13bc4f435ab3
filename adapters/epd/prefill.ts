import { AdapterError, type Call, type EncoderResult, type Handoff, type PrefillJob } from '../adapter.ts'
import { type UpstreamFailure } from '../http.ts'
import { requestOk } from '../http/json.ts'
import { CHAT, prefillEdits } from '../lmdeploy/prefill-edits.ts'
import { AGAIN_HEADER, CONSUMER_HEADER, PROXY_HEADERS } from '../wire/headers.ts'
import { numberOf, objectOf } from '../wire/json.ts'
import { inOrder, withFeatures, withTenant } from './edits.ts'
import { featuresGone } from './gone.ts'

/**
 * POST {P}/v1/...: resolves when P has computed the prompt; the KV blocks are then under a lease for D, which takes the
 * migration request as P has written it. Safe to send twice: the second try ends what was answered to the first.
 */
export async function prefillEpd (job: PrefillJob, call: Call): Promise<Handoff> {
  const { node, decode, body, features, tenant, path = CHAT } = job
  const own = prefillEdits(body, path)
  const encoded = withFeatures(body, features)
  const answer = await requestOk(node, {
    method: 'POST',
    path,
    slices: body.splice(withTenant(tenant, { ...own, ...encoded, set: { ...own.set, ...encoded.set } })),
    headers: { ...PROXY_HEADERS, [CONSUMER_HEADER]: decode.id },
    idempotent: { [AGAIN_HEADER]: '1' },
    timeout: 0
  }, call, failure => failureOf(failure, inOrder(features)))
  const migration = objectOf(objectOf(answer).migration_request)
  if (typeof migration.lease !== 'string' || !Array.isArray(migration.remote_block_ids)) {
    throw new AdapterError('UNAVAILABLE', `${node.id} answered a prefill without a migration request`, { node: node.id, how: 'nonsense' })
  }
  const { token_ids: tokens } = migration
  return {
    node: node.id,
    lease: migration.lease,
    wire: migration,
    tokens: Array.isArray(tokens) ? tokens.length : undefined,
    cached: numberOf(migration.cached_tokens)
  }
}

function failureOf (failure: UpstreamFailure, features: readonly EncoderResult[]): AdapterError | undefined {
  const { node, error } = failure
  // The gateway wrote these fields: an engine that refuses them is no prefill engine.
  if (error.param === 'preserve_cache' || error.param === 'with_cache') return new AdapterError('REFUSED', `${node.id} is no prefill engine: ${error.message}`, { node: node.id })
  return featuresGone(failure, features)
}
