import type { Call, PrepareJob } from '../adapter.ts'
import { requestOk } from '../http/json.ts'
import { engineInfoOf } from '../probes.ts'
import { AHEAD_HEADER } from '../wire/headers.ts'
import { LEASE_SCHEME } from '../wire/results.ts'
import { withTenant } from './edits.ts'

/** The client's body without pixels, which an engine that pulls ahead reads and tokenises. */
export async function prepareEpd ({ node, path, body, tenant }: PrepareJob, call: Call): Promise<void> {
  if (engineInfoOf(node)?.pulls_ahead !== true) return
  const slices = body.splice(withTenant(tenant, { mediaUrls: body.media.map(({ index }) => `${LEASE_SCHEME}${index}`) }))
  await requestOk(node, { method: 'POST', path, slices, headers: { [AHEAD_HEADER]: '1' }, idempotent: true, timeout: 0 }, call)
}
