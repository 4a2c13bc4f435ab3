/** A prompt computed by P, and its answer by D. */
import { AdapterError, type BodyEdits, type Call, type GenerateJob, type Handoff, type PrefillJob, type RequestBody, type UpstreamResponse } from '../adapter.ts'
import { postStream } from '../http.ts'
import { requestOk } from '../http/json.ts'
import { isObject, numberOf, objectOf, textOf, type Json } from '../wire/json.ts'
import { pinned, rewrittenElseRaw, watchingFeatures } from './bodies.ts'
import { CHAT } from './encode.ts'
import { failuresOf, isEngineDead } from './failures.ts'
import type { Handoffs } from './handoffs.ts'
import type { Pins } from './pins.ts'
import { atReplica, isPushed } from './received.ts'

/** What P keeps for D; `Handoff.wire`. */
interface Kept {
  /** For D as P has written it. */
  readonly params: Json
  /** When P had answered, on the clock of `performance.now()`. */
  readonly at: number
  /** For D: it gets the pixels, of which it makes only the prompt's layout. Features without its handle would end it. */
  readonly edits: BodyEdits
}

/** P frees the blocks after 30 s, and a later pull reads what other requests have put there; D may wait before it pulls. */
const LEASE_MS = 25_000

const HAND_ON = JSON.stringify({
  do_remote_decode: true, do_remote_prefill: false, remote_engine_id: null, remote_block_ids: null, remote_host: null, remote_port: null
})

/** P computes the prompt and one token, and keeps the KV blocks for D. */
export async function prefillVllm ({ node, path = CHAT, body, features, tenant }: PrefillJob, call: Call, pins: Pins, handoffs: Handoffs): Promise<Handoff> {
  const edits = pinned(body, features, pins, tenant)
  const failures = failuresOf(body)
  const pushed = isPushed(features)
  const answer = objectOf(await watchingFeatures(features, pins, rewrittenElseRaw(handoffs.rewrite(node, body, features, edits), edits, pushed, call, async (own, rewritten) => await requestOk(node, {
    method: 'POST',
    path,
    slices: body.splice({ ...own, set: { ...own.set, ...oneToken(body), kv_transfer_params: HAND_ON }, remove: ['stream_options'] }),
    timeout: 0
  }, atReplica(call, features), rewritten || pushed ? handoffs.failuresOf(node, failures, pushed) : failures))))
  const { kv_transfer_params: params, usage } = answer
  // When the first token ends the answer P keeps nothing.
  if (!isObject(params)) throw new AdapterError('KV_GONE', `${node.id} has no KV blocks to hand on`, { node: node.id, singleNode: true })
  const { prompt_tokens: tokens, prompt_tokens_details: details } = objectOf(usage)
  return {
    node: node.id,
    lease: textOf(params.remote_request_id) ?? 'kv',
    wire: { params, at: performance.now(), edits } satisfies Kept,
    tokens: numberOf(tokens),
    cached: numberOf(objectOf(details).cached_tokens)
  }
}

function oneToken (body: RequestBody): Record<string, string> {
  const set: Record<string, string> = { stream: 'false', max_tokens: '1' }
  if (body.has('max_completion_tokens')) set.max_completion_tokens = '1'
  const least = body.scalar('min_tokens')
  if (typeof least === 'number' && least > 1) set.min_tokens = '1'
  return set
}

/** D goes on with what P has computed. It gets the same names for the pictures as P, and pixels, of which it makes only the prompt's layout. */
export async function takeOver ({ node, path, body }: GenerateJob, { wire, node: prefill }: Handoff, call: Call, now: number): Promise<UpstreamResponse> {
  const { params, at, edits } = wire as Kept
  if (now - at > LEASE_MS) throw new AdapterError('KV_GONE', `the KV blocks of ${prefill} are older than their lease`, { node: node.id })
  const own = failuresOf(body)
  return await postStream(node, { path, body: body.splice({ ...edits, set: { ...edits.set, kv_transfer_params: JSON.stringify(params) } }) }, call, failure => {
    const known = own(failure)
    if (known !== undefined || failure.statusCode !== 500 || isEngineDead(failure)) return known
    // D is well, and P may not be: it answers so for blocks of an unknown engine, and after 5 s for a P that is away.
    return new AdapterError('KV_GONE', `${node.id} could not take the prompt over: ${failure.error.message ?? 'no reason given'}`, { node: node.id, unlinked: true })
  })
}
