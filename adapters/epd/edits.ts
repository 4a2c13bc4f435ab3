import type { BodyEdits, EncoderResult, RequestBody } from '../adapter.ts'
import { LEASE_SCHEME, TENANT_FIELD } from '../wire/results.ts'

/** Names the tenant to one of our engines: tenants share no caches there. */
export function withTenant (tenant: string | undefined, edits: BodyEdits = {}): BodyEdits {
  return tenant === undefined ? edits : { ...edits, set: { ...edits.set, [TENANT_FIELD]: JSON.stringify(tenant) } }
}

/** As the language model gets them. */
export function inOrder (features: readonly EncoderResult[]): EncoderResult[] {
  return [...features].sort((one, other) => one.item - other.item)
}

/** Adds `encoder_result` and replaces the URL of each encoded item by the lease on its features. No edits without features. */
export function withFeatures (body: RequestBody, features: readonly EncoderResult[]): BodyEdits {
  if (features.length === 0) return {}
  const sorted = inOrder(features)
  const mediaUrls = new Array<string | undefined>(body.media.length).fill(undefined)
  for (const { item, lease } of sorted) mediaUrls[item] = LEASE_SCHEME + lease
  return { set: { encoder_result: JSON.stringify(sorted.map(feature => feature.wire)) }, mediaUrls }
}
