import { isObject, type Json } from '../../adapters/wire/json.ts'
import type { PoolName } from '../cache/index.ts'
import type { Dtype, P2PErrorCode } from './types.ts'

/**
 * What goes over a link. A message is a JSON header in one frame and, for a chunk only, its raw bytes in a second one.
 * `id` names one transfer or call for ever: it is never used again, so a late frame of an old transfer finds no waiter.
 */
export const WIRE_VERSION = 1

/** Which lease of which process; `link` is the epoch the link was made for, so that the producer can tell an outdated link from an old lease. */
interface NamesLease { from: string, engine: string, epoch: number, lease: string, link: number }

interface Common {
  v: typeof WIRE_VERSION
  id: string
  traceparent?: string | undefined
}

/** First message on a link, and its warm-up. */
export interface Hello extends Common { type: 'hello', from: string, engine: string, epoch: number }
export interface Pull extends Common, NamesLease {
  type: 'pull'
  pool: PoolName
  blocks: number[]
  bytes: number
  /** Size of the chunks wanted. */
  chunk: number
  /** Chunks that may be sent before the first credit. */
  window: number
}
/** Chunks below `upto` may be sent, those below `upto - window` were taken. Cumulative, so a repeated one does nothing. */
export interface Credit extends Common { type: 'credit', upto: number }
export interface Cancel extends Common { type: 'cancel' }
export interface EndLease extends Common, NamesLease { type: 'ack' | 'release' }
/**
 * From a producer to a consumer, the other way than all else: `lease`, of `from`, is for blocks that are being filled. It has
 * no answer. The consumer believes nothing of it but asks over its own link, whose other end it knows.
 */
export interface Offer extends Common, NamesLease { type: 'offer' }
/** What is offered under a lease? */
export interface AskOffer extends Common, NamesLease { type: 'ask' }
export type Request = Hello | Pull | Credit | Cancel | EndLease | Offer | AskOffer

export interface Welcome extends Common { type: 'welcome', engine: string, epoch: number }
export interface Chunk extends Common {
  type: 'chunk'
  seq: number
  /** Of the first byte, counted over the blocks in the order they were asked for. */
  offset: number
  dtype: Dtype
  dims: number[]
  crc32: number
}
export interface Ended extends Common { type: 'ended', ended: boolean }
/** The blocks of an offer, in the words of the producer's HTTP answer. */
export interface Offered extends Common { type: 'offered', offer: object }
export interface Failure extends Common { type: 'error', code: P2PErrorCode, message: string }
/** Only to learn whether the peer is still there: a router that can't route says so. */
export interface Alive extends Common { type: 'alive' }
export type Reply = Welcome | Chunk | Ended | Offered | Failure | Alive

/** Requests are small: the largest is a list of block ids. A peer that sends more is cut off by zeromq. */
export function maxRequestBytes (blocks: number): number {
  return (16 << 10) + 16 * blocks
}

export const MIN_CHUNK_BYTES = 64 << 10
export const MAX_CHUNK_BYTES = 8 << 20
export const MAX_WINDOW = 16
/** What a peer may say is wrong; the other codes are this engine's own findings. */
const FAILURES: ReadonlySet<unknown> = new Set<P2PErrorCode>(['STALE', 'GONE', 'REFUSED', 'NOT_LINKED', 'TIMEOUT'])
/** Dimensions of a chunk. */
const MAX_DIMS = 8
/** Characters of an engine id, a lease or a trace context. */
const MAX_TEXT = 2048
/** The largest reply is an offer with its block ids. */
const MAX_REPLY_BYTES = 256 << 10
/** The ids lie in a list in the offer in the header. What is deeper overflows the stack of the thread that copies it. */
const MAX_DEPTH = 3

export function encodeHeader (header: Request | Reply): Buffer {
  return Buffer.from(JSON.stringify(header))
}

function parse (frame: Uint8Array): Json | undefined {
  try {
    const fields: unknown = JSON.parse(Buffer.from(frame.buffer, frame.byteOffset, frame.byteLength).toString('utf8'))
    if (!isObject(fields)) return undefined
    const known = fields.v === WIRE_VERSION && typeof fields.id === 'string' && fields.id.length <= 64
    return known && (fields.traceparent === undefined || isText(fields.traceparent)) && isFlat(fields) ? fields : undefined
  } catch {
    return undefined
  }
}

/** Replies repeat some of a request's texts, so their length is bounded. */
function isText (value: unknown): boolean {
  return typeof value === 'string' && value.length <= MAX_TEXT
}

function isFlat (value: unknown, depth = MAX_DEPTH): boolean {
  if (typeof value !== 'object' || value === null) return true
  return depth > 0 && Object.values(value).every((inner) => isFlat(inner, depth - 1))
}

function isDtype (value: unknown): boolean {
  return value === 'float32' || value === 'float16'
}

function isCount (value: unknown, max = Number.MAX_SAFE_INTEGER): boolean {
  return Number.isSafeInteger(value) && (value as number) >= 0 && (value as number) <= max
}

function namesLease (f: Json): boolean {
  return isText(f.from) && isText(f.engine) && isCount(f.epoch) && isCount(f.link) && isText(f.lease)
}

/** By type. Maps, because a peer chooses the name that is looked up: an object has members that it never was given. */
type Checks = ReadonlyMap<unknown, (fields: Json) => boolean>

const REQUESTS: Checks = new Map<Request['type'], (f: Json) => boolean>([
  ['hello', (f) => isText(f.from) && isText(f.engine) && isCount(f.epoch)],
  ['pull', (f) => namesLease(f) && (f.pool === 'feature' || f.pool === 'kv') && Array.isArray(f.blocks) && f.blocks.every((id) => isCount(id)) &&
    isCount(f.bytes) && isCount(f.chunk) && isCount(f.window)],
  ['credit', (f) => isCount(f.upto)],
  ['cancel', () => true],
  ['ack', namesLease],
  ['release', namesLease],
  ['offer', namesLease],
  ['ask', namesLease]
])

const REPLIES: Checks = new Map<Reply['type'], (f: Json) => boolean>([
  ['welcome', (f) => typeof f.engine === 'string' && isCount(f.epoch)],
  ['chunk', (f) => isCount(f.seq) && isCount(f.offset) && isCount(f.crc32, 0xffffffff) && isDtype(f.dtype) && Array.isArray(f.dims) && f.dims.length <= MAX_DIMS && f.dims.every((n) => isCount(n))],
  ['ended', (f) => typeof f.ended === 'boolean'],
  ['offered', (f) => isObject(f.offer)],
  ['error', (f) => FAILURES.has(f.code) && isText(f.message)],
  ['alive', () => true]
])

function decode (frame: Uint8Array, checks: Checks): Json | undefined {
  const fields = parse(frame)
  return fields !== undefined && checks.get(fields.type)?.(fields) === true ? fields : undefined
}

/** A peer's request, or undefined if it is not one: peers are not trusted to be well-formed. */
export function decodeRequest (frame: Uint8Array): Request | undefined {
  return decode(frame, REQUESTS) as unknown as Request | undefined
}

export function decodeReply (frame: Uint8Array): Reply | undefined {
  return frame.length > MAX_REPLY_BYTES ? undefined : decode(frame, REPLIES) as unknown as Reply | undefined
}
