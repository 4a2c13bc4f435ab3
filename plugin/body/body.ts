import { isUtf8 } from 'node:buffer'
import type { BodyEdits, MediaItem, RequestBody } from '../../adapters/adapter.ts'
import { epdError } from '../errors.ts'
import { Collector, decodeString, type Member } from './collector.ts'
import { JsonScanner } from './json-scanner.ts'
import { describeMedia } from './media.ts'
import { Pace } from './pace.ts'
import { checkUtf8, UTF8_STEP } from './utf8.ts'

/** Bytes scanned between two looks at the clock. */
const SCAN_STEP = 128 * 1024
/** Slices shorter than this are copied together: a write call costs more than copying them, in bytes. */
const SMALL = 4096
/** Bodies up to this size become one buffer, in bytes. */
const ONE_BUFFER = 64 * 1024
/** What a pick takes over beside the media parts: these change how engines read media. */
const PICKED_MEMBERS = ['model', 'mm_processor_kwargs', 'media_io_kwargs'] as const

const COMMA = Buffer.from(',')

/** A request body as the plugin's core sees it. */
export interface Body extends RequestBody {
  /** The body as it came. */
  readonly bytes: Buffer
  /** Bytes that are not media: a measure of the prompt. */
  readonly textBytes: number
  /** Control fields that the client tried to send. */
  readonly stripped: readonly string[]
  /** JSON text of a top-level member; undefined when it is absent. */
  json (name: string): Buffer | undefined
}

/**
 * Reads a request body once, as bytes: checks that it is JSON in UTF-8, notes its top-level members and its media parts,
 * takes out control fields. Gives way to other requests every few milliseconds. The bytes must not change afterwards.
 *
 * @throws EPD_ERR_INVALID_JSON and EPD_ERR_INVALID_UTF8 with the byte offset; EPD_ERR_DUPLICATE_MEMBER,
 * EPD_ERR_MISSING_VALUE, EPD_ERR_INVALID_VALUE, EPD_ERR_INVALID_MEDIA, EPD_ERR_TOO_MANY_MEDIA with the member or part as `param`.
 */
export async function parseBody (bytes: Buffer): Promise<Body> {
  const pace = new Pace()
  if (bytes.length > UTF8_STEP || !isUtf8(bytes)) await checkUtf8(bytes, pace)
  const collector = new Collector(bytes)
  const scanner = new JsonScanner(bytes, collector)
  while (!scanner.run(scanner.position + SCAN_STEP)) if (pace.due()) await pace.rest()
  const media = collector.media.length === 0 ? [] : await describeMedia(bytes, collector.media, pace)
  return new ScannedBody(bytes, collector, media)
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
  readonly stripped: readonly string[]
  /** Top-level members that go upstream, in order. */
  readonly #members: readonly Member[]
  readonly #byName: ReadonlyMap<string, Member>

  constructor (bytes: Buffer, { members, byName, stripped }: Collector, media: readonly MediaItem[]) {
    this.bytes = bytes
    this.media = media
    this.#members = members
    this.#byName = byName
    this.stripped = stripped
    this.textBytes = media.reduce((rest, item) => rest - (item.url.end - item.url.start), bytes.length)
    this.model = this.#readModel()
    this.stream = this.#readStream()
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

  splice ({ set = {}, remove = [], mediaUrls = [] }: BodyEdits): Buffer[] {
    const added = new Map(Object.entries(set))
    const edited = added.size > 0 || remove.some(name => this.has(name)) || mediaUrls.some(url => url !== undefined)
    if (!edited && this.stripped.length === 0) return [this.bytes]
    const members: Buffer[][] = []
    for (const member of this.#members) {
      const { name, start, end } = member
      if (name !== undefined && added.has(name)) members.push([memberText(name, added.get(name)!)])
      else if (name !== undefined && remove.includes(name)) continue
      else members.push(name === 'messages' ? this.#withMediaUrls(member, mediaUrls) : [this.bytes.subarray(start, end)])
      if (name !== undefined) added.delete(name)
    }
    for (const [name, json] of added) members.push([memberText(name, json)])
    const chunks = [Buffer.from('{'), ...members.flatMap((chunks, i) => i === 0 ? chunks : [COMMA, ...chunks])]
    const last = chunks.at(-1)!
    const start = last.byteOffset - this.bytes.byteOffset
    // The messages often come last: their slice then takes the closing brace along.
    if (last.buffer === this.bytes.buffer && start + last.length === this.bytes.length - 1) chunks[chunks.length - 1] = this.bytes.subarray(start)
    else chunks.push(Buffer.from('}'))
    return compact(chunks)
  }

  pick (items: readonly MediaItem[], set: Readonly<Record<string, string>> = {}): Buffer[] {
    const chunks: Buffer[] = [Buffer.from('{')]
    for (const name of PICKED_MEMBERS) {
      const json = this.json(name)
      if (json !== undefined && !Object.hasOwn(set, name)) chunks.push(Buffer.from(`"${name}":`), json, COMMA)
    }
    for (const [name, json] of Object.entries(set)) chunks.push(memberText(name, json), COMMA)
    chunks.push(Buffer.from('"messages":['))
    let message: number | undefined
    for (const item of items) {
      if (item.message === message) chunks.push(COMMA)
      else chunks.push(Buffer.from(`${message === undefined ? '' : ']},'}{"role":"user","content":[`))
      message = item.message
      chunks.push(this.bytes.subarray(item.span.start, item.span.end))
    }
    chunks.push(Buffer.from(message === undefined ? ']}' : ']}]}'))
    return compact(chunks)
  }

  /** The messages, which hold all media, with new URLs. */
  #withMediaUrls (messages: Member, urls: ReadonlyArray<string | undefined>): Buffer[] {
    const chunks: Buffer[] = []
    let start = messages.start
    for (const [i, { url }] of this.media.entries()) {
      const replacement = urls[i]
      if (replacement === undefined) continue
      chunks.push(this.bytes.subarray(start, url.start), Buffer.from(JSON.stringify(replacement).slice(1, -1)))
      start = url.end
    }
    return [...chunks, this.bytes.subarray(start, messages.end)]
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

function memberText (name: string, json: string): Buffer {
  return Buffer.from(`${JSON.stringify(name)}:${json}`)
}

/** Copies neighbouring small chunks together; big ones stay slices of the original. */
function compact (chunks: readonly Buffer[]): Buffer[] {
  if (chunks.reduce((sum, chunk) => sum + chunk.length, 0) <= ONE_BUFFER) return [Buffer.concat(chunks)]
  const result: Buffer[] = []
  let small: Buffer[] = []
  const flush = (): void => {
    const joined = Buffer.concat(small)
    if (joined.length > 0) result.push(joined)
    small = []
  }
  for (const chunk of chunks) {
    if (chunk.length < SMALL) small.push(chunk)
    else {
      flush()
      result.push(chunk)
    }
  }
  flush()
  return result
}
