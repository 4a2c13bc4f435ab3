/** What a language server says to an encoder, and the calls by which the gateway passes it on. */
import { AdapterError, type AdapterNode, type Call } from '../adapter.ts'
import { requestJson, type JsonAnswer } from '../http/json.ts'
import { isObject, textOf } from '../wire/json.ts'

/** Body of POST /encode: one part of a request's pictures. Members that the gateway does not read stay in it. */
export interface EncodeRequest {
  /** `<rid>_local_part_<n>` */
  readonly req_id: string
  /** URLs, or objects with one. */
  readonly mm_items: readonly unknown[]
  readonly num_parts: number
  readonly part_idx: number
  readonly modality?: unknown
  /** Null: receivers are named by /scheduler_receive_url, or ask by /send. Else the encoder pushes to it at once. */
  readonly embedding_port?: unknown
}

/** Body of POST /scheduler_receive_url: where one rank of the language server takes the embeddings of a part. */
export interface ReceiverRequest { readonly req_id: string, readonly receive_url: string }

/** Answer to POST /scheduler_receive_meta_data. Comes after preprocessing, before the encoder's forward pass. */
export interface PartMeta { readonly embedding_size?: unknown, readonly embedding_len?: unknown, readonly embedding_dim?: unknown }

const PART = '_local_part_'

/** With `zmq_to_tokenizer` the call names the receiver: the encoder pushes to it when it is ready, whatever becomes of the call. */
export function namesReceiver ({ embedding_port: port }: EncodeRequest): boolean {
  return port !== null && port !== undefined
}

/** The request's id in a part's. Encoders and language servers cut at the last separator, so that what follows it is free. */
export function requestIdOf (partId: string): string {
  const at = partId.lastIndexOf(PART)
  return at === -1 ? partId : partId.slice(0, at)
}

/** The text of what is wrong with an encode request, in SGLang's words, or the request. */
export function readEncode (body: unknown): EncodeRequest | string {
  if (!isObject(body) || textOf(body.req_id) === undefined || body.req_id === '') return 'missing or invalid req_id'
  if (!Array.isArray(body.mm_items) || body.mm_items.length === 0) return 'missing or empty mm_items'
  const { num_parts: parts, part_idx: part } = body
  if (!Number.isSafeInteger(parts) || (parts as number) < 1) return 'num_parts must be a positive integer'
  if (!Number.isSafeInteger(part) || (part as number) < 0 || (part as number) >= (parts as number)) return `part_idx must be in [0, ${String(parts)})`
  return body as unknown as EncodeRequest
}

export function urlOf (item: unknown): string {
  return typeof item === 'string' ? item : isObject(item) ? textOf(item.url) ?? '' : ''
}

/** Gives every status. Rejects with UNAVAILABLE when the encoder breaks off, or with the signal's reason. No time limit of its own. */
export async function callEncoder (node: AdapterNode, path: '/encode' | '/send' | '/scheduler_receive_url' | '/scheduler_receive_meta_data', body: Buffer, call: Call): Promise<JsonAnswer> {
  return await requestJson(node, { method: 'POST', path, slices: [body], timeout: 0 }, call)
}

/** An encoder's error answer. 400: the pictures are to blame; every other encoder would say so too. */
export function encoderError (node: AdapterNode, { statusCode, body }: JsonAnswer): AdapterError {
  const said = isObject(body) ? textOf(body.message) : undefined
  const message = `${node.id} answered ${statusCode}${said === undefined ? '' : `: ${shortened(said)}`}`
  const code = statusCode === 400 ? 'REJECTED' : statusCode === 503 || statusCode === 429 ? 'BUSY' : 'UNAVAILABLE'
  return new AdapterError(code, message, { node: node.id })
}

/** SGLang repeats the client's data URL in its messages. */
function shortened (message: string): string {
  return message.replace(/data:[^\s,]{0,100},\S*/g, 'data:...').slice(0, 500)
}
