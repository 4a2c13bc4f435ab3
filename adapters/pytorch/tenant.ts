import type { AdapterNode, BodyEdits } from '../adapter.ts'
import { isOurNode } from '../lmdeploy.ts'

/** Tells one of our engines whose request it is: tenants share no caches there. Other servers know no such thing. */
export function withTenant (node: AdapterNode, tenant: string | undefined, edits: BodyEdits = {}): BodyEdits {
  if (tenant === undefined || !isOurNode(node)) return edits
  return { ...edits, set: { ...edits.set, epd_tenant: JSON.stringify(tenant) } }
}
