import { AdapterError, type Call, type EncodeJob, type EncoderResult, type MediaItem } from '../adapter.ts'
import { failureError, requestOk, type UpstreamFailure } from '../http.ts'
import { CHAT } from '../lmdeploy/prefill-edits.ts'
import { AGAIN_HEADER, CONSUMER_HEADER } from '../wire/headers.ts'
import { isObject, listOf, objectOf } from '../wire/json.ts'
import { TENANT_FIELD } from '../wire/results.ts'

/** Makes it safe to send a request twice: the engine ends the leases of its first answer. */
export const SENT_AGAIN: Readonly<Record<string, string>> = { [AGAIN_HEADER]: '1' }

const POSITION = /messages\[(\d+)\]\.content\[(\d+)\]/g

/** Where each item stands in the body the encoder gets: `RequestBody.pick` makes one message per original message. */
function positions (items: readonly MediaItem[]): Map<string, MediaItem> {
  const found = new Map<string, MediaItem>()
  let message = -1
  let part = 0
  let last: number | undefined
  for (const item of items) {
    if (item.message !== last) {
      message++
      part = 0
      last = item.message
    }
    found.set(`${message}.${part++}`, item)
  }
  return found
}

/** Turns the encoder's positions into the client's, in `param` and in the text. */
function translate (failure: UpstreamFailure, items: Map<string, MediaItem>): AdapterError | undefined {
  const { statusCode, error, node } = failure
  if (statusCode < 400 || statusCode >= 500 || statusCode === 429 || statusCode === 401) return undefined
  const original = (text: string): string => text.replace(POSITION, (whole, message: string, part: string) => {
    const item = items.get(`${message}.${part}`)
    return item === undefined ? whole : `messages[${item.message}].content[${item.part}]`
  })
  if (typeof error.message !== 'string') return undefined
  const param = typeof error.param === 'string' ? original(error.param) : error.param ?? null
  const body = Buffer.from(JSON.stringify({ error: { ...error, message: original(error.message), param } }))
  return failureError({ ...failure, node, body, contentType: 'application/json', error: { ...error, message: original(error.message) } })
}

function resultOf (job: EncodeJob, item: MediaItem, wire: unknown, items: Map<string, MediaItem>): EncoderResult {
  const placed = isObject(wire) && wire.message !== undefined ? items.get(`${String(wire.message)}.${String(wire.part)}`) : item
  if (!isObject(wire) || placed !== item || typeof wire.lease !== 'string' || typeof wire.num_tokens !== 'number') {
    throw new AdapterError('UNAVAILABLE', `${job.node.id} answered an encode request with something that is no encoder result`, { node: job.node.id })
  }
  return {
    item: item.index,
    node: job.node.id,
    lease: wire.lease,
    tokens: wire.num_tokens,
    cached: wire.cached === true,
    wire: { ...wire, message: item.message, part: item.part }
  }
}

/** POST {E}/v1/chat/completions with the media parts alone. Safe to send twice: the second try ends what was answered to the first. */
export async function encodeEpd (job: EncodeJob, call: Call): Promise<EncoderResult[]> {
  const { node, items } = job
  const places = positions(items)
  const set = job.tenant === undefined ? undefined : { [TENANT_FIELD]: JSON.stringify(job.tenant) }
  const answer = await requestOk(node, {
    method: 'POST',
    path: CHAT,
    slices: job.body.pick(items, set),
    headers: { [CONSUMER_HEADER]: job.consumer.id },
    idempotent: SENT_AGAIN,
    timeout: 0
  }, call, failure => translate(failure, places))
  const list = listOf(objectOf(answer).encoder_result)
  return items.map((item, i) => resultOf(job, item, list[i], places))
}
