import type { Call, GenerateJob, UpstreamResponse } from '../adapter.ts'
import { postStream } from '../http.ts'
import { pinned, rewrittenElseRaw, watchingFeatures } from './bodies.ts'
import { failuresOf } from './failures.ts'
import type { Handoffs } from './handoffs.ts'
import type { Pins } from './pins.ts'
import { atReplica, isPushed } from './received.ts'

/** PD, or D without P: it encodes itself what no encoder has. */
export async function generateVllm ({ node, path, body, features, tenant }: GenerateJob, call: Call, pins: Pins, handoffs: Handoffs): Promise<UpstreamResponse> {
  const failures = failuresOf(body)
  const edits = pinned(body, features, pins, tenant)
  const pushed = isPushed(features)
  return await watchingFeatures(features, pins, rewrittenElseRaw(handoffs.rewrite(node, body, features, edits), edits, pushed, call, async (edits, rewritten) =>
    await postStream(node, { path, body: body.splice(edits) }, atReplica(call, features), rewritten || pushed ? handoffs.failuresOf(node, failures, pushed) : failures)))
}
