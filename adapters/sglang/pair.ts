/** Prefill and decode on two servers: both get the same request at the same time, and meet by a number. */
import { randomInt } from 'node:crypto'
import { TimeLimit } from '../abort.ts'
import { AdapterError, type AdapterNode, type Call, type GenerateJob, type Handoff, type Link, type PrefillJob, type UpstreamResponse } from '../adapter.ts'
import { detailsOf, KV_FORMAT } from './info.ts'
import { sendSglang, type Bootstrap } from './send.ts'

/** SGLang takes up to 2^63; a JSON number of ours keeps up to 2^53. */
const ROOMS = 2 ** 47

/** P's half of a request under way. */
interface Prefilling {
  readonly bootstrap: Bootstrap
  /** Rejects when P has failed; its answer itself is of no use. */
  readonly answer: Promise<UpstreamResponse>
  readonly limit: TimeLimit
}

/** They find each other by the request. Throws REFUSED where they can't. */
export async function linkPair (a: AdapterNode, b: AdapterNode): Promise<Link> {
  const [from, to] = [detailsOf(a)?.kvTransfer, detailsOf(b)?.kvTransfer]
  if (a.info?.produces.includes(KV_FORMAT) !== true || b.info?.accepts.includes(KV_FORMAT) !== true) throw new AdapterError('REFUSED', `${a.id} and ${b.id} are no prefill and decode servers of SGLang`, { node: b.id })
  if (from !== to) throw new AdapterError('REFUSED', `they move KV blocks differently: ${String(from)} and ${String(to)} (--disaggregation-transfer-backend)`, { node: b.id })
  return { from: a.id, to: b.id, transport: from ?? 'sglang', epochs: [a.info.epoch, b.info.epoch] }
}

/** Starts P, and does not wait: its answer comes when D has the KV blocks. */
export async function prefillSglang ({ node, path = '/v1/chat/completions', body, features }: PrefillJob, call: Call): Promise<Handoff> {
  if (features.length > 0 || detailsOf(node)?.mode !== 'prefill') throw new AdapterError('REFUSED', `${node.id} hands no KV blocks on`, { node: node.id })
  const bootstrap: Bootstrap = { bootstrap_host: new URL(node.url).hostname, bootstrap_port: detailsOf(node)!.bootstrapPort, bootstrap_room: randomInt(ROOMS) }
  // It outlives this call, and ends with D's or by `release`.
  const limit = new TimeLimit(0)
  const answer = sendSglang(node, path, body, { ...call, signal: limit }, bootstrap)
  answer.then(response => { response.body.on('error', () => {}).resume() }).catch(() => {})
  return { node: node.id, lease: String(bootstrap.bootstrap_room), wire: { bootstrap, answer, limit } satisfies Prefilling }
}

/** D's half. P's failure is this call's: D would wait for KV blocks that never come. */
export async function decodeSglang ({ node, path, body }: GenerateJob, handoff: Handoff, call: Call): Promise<UpstreamResponse> {
  const { bootstrap, answer } = handoff.wire as Prefilling
  const limit = new TimeLimit(0, call.signal)
  let begun = false
  const failed = new Promise<never>((_resolve, reject) => {
    answer.catch((cause: unknown) => {
      const error = AdapterError.is(cause) && cause.fault === 'client' ? cause : new AdapterError('KV_GONE', `the prefill has failed: ${(cause as Error).message}`, { node: handoff.node, cause })
      if (!begun) limit.abort(error)
      reject(error)
    })
  })
  const response = await Promise.race([sendSglang(node, path, body, { ...call, signal: limit }, bootstrap), failed])
  // D has the KV blocks.
  begun = true
  return response
}

export function releasePrefill (wire: unknown): void {
  (wire as Prefilling).limit.abort(new DOMException('The request is over', 'AbortError'))
}
