import { isUtf8 } from 'node:buffer'
import type { BodyEdits, MediaItem, Privileged, RequestBody } from '../../adapters/adapter.ts'
import { epdError } from '../errors.ts'
import { Collector, type Member } from './collector.ts'
import { decodeString, JsonScanner } from './json-scanner.ts'
import { describeMedia } from './media.ts'
import type { PromptSize } from './members.ts'
import { pick, splice } from './splice.ts'
import { scanInSteps } from './steps.ts'

/** A body up to this size is scanned in one go, in bytes: well under a millisecond. */
const ONE_GO = 128 * 1024

/** A request body as the plugin's core sees it. */
export interface Body extends RequestBody {
  /** Bytes that are not media: a measure of the prompt. */
  readonly textBytes: number
  readonly size: PromptSize
  /** Control fields that the client tried to send. */
  readonly stripped: readonly string[]
  /** JSON text of a top-level member; undefined when it is absent. */
  json (name: string): Buffer | undefined
}

/**
 * Reads a request body once, as bytes: checks that it is JSON in UTF-8, notes its top-level members and its media parts,
 * takes out control fields. Gives way to other requests every few milliseconds. The bytes must not change afterwards.
 *
 * @param nameless whether it may name no model: that is '' then
 * @throws EPD_ERR_INVALID_JSON and EPD_ERR_INVALID_UTF8 with the byte offset; EPD_ERR_DUPLICATE_MEMBER,
 * EPD_ERR_MISSING_VALUE, EPD_ERR_INVALID_VALUE, EPD_ERR_INVALID_MEDIA, EPD_ERR_TOO_MANY_MEDIA with the member or part as `param`.
 */
export async function parseBody (bytes: Buffer, nameless = false): Promise<Body> {
  const collector = new Collector(bytes)
  const scanner = new JsonScanner(bytes, collector)
  if (bytes.length <= ONE_GO && isUtf8(bytes)) scanner.run(bytes.length)
  else await scanInSteps(bytes, scanner)
  return new ScannedBody(bytes, collector, collector.media.length === 0 ? [] : await describeMedia(bytes, collector.media), nameless)
}

/** The same for a value that the gateway or its application has made; strings and Buffers are taken as JSON text. */
export async function parseBodyValue (value: unknown): Promise<Body> {
  if (Buffer.isBuffer(value)) return await parseBody(value)
  const text = typeof value === 'string' ? value : JSON.stringify(value)
  if (text === undefined) throw epdError('EPD_ERR_INVALID_JSON', ['The request body must be a JSON object'])
  return await parseBody(Buffer.from(text))
}

class ScannedBody implements Body {
  readonly bytes: Buffer
  readonly media: readonly MediaItem[]
  readonly model: string
  readonly stream: boolean
  readonly textBytes: number
  readonly size: PromptSize
  readonly stripped: readonly string[]
  /** Top-level members that go upstream, in order. */
  readonly #members: readonly Member[]
  readonly #byName: ReadonlyMap<string, Member>
  readonly #privileged: readonly Privileged[]

  constructor (bytes: Buffer, { members, byName, stripped, privileged, size }: Collector, media: readonly MediaItem[], nameless: boolean) {
    this.bytes = bytes
    this.media = media
    this.#members = members
    this.#byName = byName
    this.size = size
    this.stripped = stripped
    this.#privileged = privileged
    this.textBytes = media.reduce((rest, item) => rest - (item.url.end - item.url.start), bytes.length)
    this.model = nameless && !this.has('model') ? '' : this.#readModel()
    this.stream = this.#readStream()
  }

  get privileged (): readonly Privileged[] {
    return [
      ...this.stripped.map(param => ({ param, kind: 'control' as const })),
      ...(this.has('prompt_embeds') ? [{ param: 'prompt_embeds', kind: 'embeddings' as const }] : []),
      ...this.#privileged
    ]
  }

  has (name: string): boolean {
    return this.#byName.has(name)
  }

  scalar (name: string): string | number | boolean | null | undefined {
    const member = this.#byName.get(name)
    if (member === undefined) return undefined
    switch (member.kind) {
      case 'string': return decodeString(this.bytes, member.valueStart + 1, member.end - 1, member.escaped)
      case 'number': return Number(this.bytes.toString('latin1', member.valueStart, member.end))
      case 'true': return true
      case 'false': return false
      case 'null': return null
      default: return undefined
    }
  }

  json (name: string): Buffer | undefined {
    const member = this.#byName.get(name)
    return member && this.bytes.subarray(member.valueStart, member.end)
  }

  splice (edits: BodyEdits): Buffer[] {
    const { set = {}, remove = [], mediaUrls = [], mediaParts = [] } = edits
    const edited = this.stripped.length > 0 || Object.keys(set).length > 0 || remove.some(name => this.has(name)) || [...mediaUrls, ...mediaParts].some(edit => edit !== undefined)
    return edited ? splice(this.bytes, this.#members, this.media, edits) : [this.bytes]
  }

  pick (items: readonly MediaItem[], set: Readonly<Record<string, string>> = {}, parts?: BodyEdits['mediaParts']): Buffer[] {
    return pick(this, items, set, parts)
  }

  #readModel (): string {
    const model = this.scalar('model')
    if (typeof model === 'string' && model !== '') return model
    if (!this.has('model')) throw epdError('EPD_ERR_MISSING_VALUE', ['model'], { param: 'model' })
    throw epdError('EPD_ERR_INVALID_VALUE', ['model must be a non-empty string'], { param: 'model' })
  }

  #readStream (): boolean {
    const stream = this.scalar('stream')
    if (typeof stream === 'boolean') return stream
    if (stream === null || !this.has('stream')) return false
    throw epdError('EPD_ERR_INVALID_VALUE', ['stream must be true or false'], { param: 'stream' })
  }
}
