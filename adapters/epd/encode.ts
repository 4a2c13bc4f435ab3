import { AdapterError, type Call, type EncodeJob, type EncoderResult, type MediaItem } from '../adapter.ts'
import { failureError, type UpstreamFailure } from '../http.ts'
import { requestOk } from '../http/json.ts'
import { CHAT } from '../lmdeploy/prefill-edits.ts'
import { engineInfoOf } from '../probes.ts'
import { AGAIN_HEADER, CONSUMER_HEADER, OVERLAP_HEADER } from '../wire/headers.ts'
import { isObject, listOf, objectOf } from '../wire/json.ts'
import { TENANT_FIELD } from '../wire/results.ts'

/** A media item, and where it stands in the body that the encoder gets. */
interface Placed {
  readonly item: MediaItem
  readonly message: number
  readonly part: number
}

/** POST {E}/v1/chat/completions with the media parts alone. Safe to send twice: the second try ends what was answered to the first. */
export async function encodeEpd (job: EncodeJob, call: Call): Promise<EncoderResult[]> {
  const { node, items, body, consumer, tenant, overlap } = job
  const offers = overlap !== undefined && engineInfoOf(consumer)?.pulls_ahead === true
  const placed = place(items)
  const answer = await requestOk(node, {
    method: 'POST',
    path: CHAT,
    slices: body.pick(items, tenant === undefined ? undefined : { [TENANT_FIELD]: JSON.stringify(tenant) }),
    headers: { [CONSUMER_HEADER]: consumer.id, ...offers ? { [OVERLAP_HEADER]: `${overlap}:${items.map(item => item.index).join()}` } : {} },
    idempotent: { [AGAIN_HEADER]: '1' },
    timeout: 0
  }, call, failure => rejected(failure, placed))
  const results = listOf(objectOf(answer).encoder_result)
  return placed.map((one, i) => resultOf(node.id, one, results[i]))
}

/** `RequestBody.pick` makes one message of each original message that has items, and numbers its parts anew. */
function place (items: readonly MediaItem[]): Placed[] {
  let message = -1
  let part = 0
  return items.map((item, i) => {
    if (item.message === items[i - 1]?.message) part++
    else [message, part] = [message + 1, 0]
    return { item, message, part }
  })
}

/** Entries come in the order of the items; one that names another position belongs to another item. */
function resultOf (node: string, { item, message, part }: Placed, wire: unknown): EncoderResult {
  const here = isObject(wire) && (wire.message === undefined || (wire.message === message && wire.part === part))
  if (!here || typeof wire.lease !== 'string' || wire.lease === '' || !isCount(wire.num_tokens) || !areBlocks(wire.remote_block_ids)) {
    throw new AdapterError('UNAVAILABLE', `${node} answered an encode request with something that is no encoder result`, { node, how: 'nonsense' })
  }
  return {
    item: item.index,
    node,
    lease: wire.lease,
    tokens: wire.num_tokens as number,
    cached: wire.cached === true,
    wire: { ...wire, message: item.message, part: item.part }
  }
}

function isCount (value: unknown): boolean {
  return Number.isSafeInteger(value) && (value as number) >= 0
}

function areBlocks (value: unknown): boolean {
  return value === undefined || (Array.isArray(value) && value.every(isCount))
}

const POSITION = /messages\[(\d+)\]\.content\[(\d+)\]/g

/** The encoder's refusal of a media item, with its positions turned into the client's, in `param` and in the text. */
function rejected (failure: UpstreamFailure, placed: readonly Placed[]): AdapterError | undefined {
  const { statusCode, error: { message, param } } = failure
  if (statusCode < 400 || statusCode >= 500 || statusCode === 429 || statusCode === 401 || typeof message !== 'string') return undefined
  const original = (text: string): string => text.replace(POSITION, (position, m: string, p: string) => {
    const found = placed.find(({ message, part }) => message === Number(m) && part === Number(p))
    return found?.item.path ?? position
  })
  const error = { ...failure.error, message: original(message), param: typeof param === 'string' ? original(param) : param ?? null }
  return failureError({ ...failure, body: Buffer.from(JSON.stringify({ error })), contentType: 'application/json', error })
}
