import type { Privileged } from '../../adapters/adapter.ts'
import { isEmbedded, MAX_NESTING, MEDIA, mediaTypeOf, sourcesOf, SOURCES } from '../../adapters/wire/media.ts'
import { LEASE_SCHEME } from '../../adapters/wire/results.ts'
import { epdError } from '../errors.ts'
import { decodeString, type ScalarKind } from './json-scanner.ts'
import { isLeaseUrl } from './lease-url.ts'

interface Text { readonly start: number, readonly end: number, readonly escaped: boolean }

/** A media part. Its hash and size, which take time, are added later. */
export interface FoundMedia {
  readonly message: number
  readonly part: number
  readonly path: string
  readonly type: string
  /** The media URL or base64 text, if it has any. */
  readonly url: Text | undefined
  /** The member that has it. */
  readonly member: string | undefined
  readonly span: { readonly start: number, readonly end: number }
}

/** A part that is being read. */
interface Part {
  readonly list: string
  readonly index: number
  readonly start: number
  /** Media found before it: what its own list of parts holds counts only if it is no media itself. */
  readonly before: number
  type: string | undefined
  hasUuid: boolean
  /** The member that is being read. */
  name: string | undefined
  /** Members that are read by name, to find one that is there twice: parsers differ in which of them they believe. */
  readonly seen: string[]
  /** Its media members, with the URL of those that have one. */
  readonly urls: Map<string, Text | undefined>
  readonly nulls: string[]
}

// What a container is.
const OTHER = 0
const LIST = 1
const PART = 2
/** The value of a media member: `{ url }`. */
const OBJECT = 3

const MEDIA_MEMBERS: ReadonlySet<string> = new Set([...MEDIA.keys(), ...SOURCES])
const READ: ReadonlySet<string> = new Set(['type', 'uuid', 'content', 'prompt_embeds', ...MEDIA_MEMBERS])
const MAX_MEDIA = 512

/** Notes the media among the parts of messages, by the grammar of adapters/wire/media.ts, while the scanner reads them. */
export class MediaCollector {
  readonly found: FoundMedia[] = []
  /** What only a gateway may send to some engines. */
  readonly privileged: Privileged[] = []

  readonly #bytes: Buffer
  #message = -1
  /** Kinds of the open containers, and of lists the last part's index, by the depth of what is in them. */
  readonly #kinds: number[] = []
  readonly #indices: number[] = []
  /** Lists of parts that are open, by their path; one more than the parts that are open, in a list. */
  readonly #lists: string[] = []
  readonly #parts: Part[] = []
  /** Members of the object that holds the media. */
  #inner: string | undefined
  #innerSeen: string[] = []

  constructor (bytes: Buffer) {
    this.#bytes = bytes
  }

  /** The parts of a message begin: a list of them, or one alone. */
  begin (depth: number, message: number, path: string, array: boolean, start: number): void {
    this.#message = message
    if (array) this.#beginList(depth + 1, path)
    else this.#beginPart(depth + 1, path, -1, start)
  }

  key (depth: number, name: string | undefined): void {
    if (this.#kinds[depth] === OBJECT) {
      this.#inner = name
      if (name === 'url' || name === 'data') this.#once(this.#innerSeen, name)
      return
    }
    const part = this.#parts.at(-1)!
    part.name = name
    if (name === undefined || !READ.has(name)) return
    this.#once(part.seen, name)
    if (name === 'uuid') this.privileged.push({ param: `${where(part)}.uuid`, kind: 'uuid' })
    else if (isEmbedded(name)) this.privileged.push({ param: `${where(part)}.${name}`, kind: 'embeddings' })
  }

  scalar (depth: number, kind: ScalarKind, start: number, end: number, escaped: boolean): void {
    const container = this.#kinds[depth]
    if (container === LIST) this.#indices[depth]!++
    else if (container === OBJECT) {
      if (kind === 'string') this.#innerText({ start, end, escaped })
    } else {
      const part = this.#parts.at(-1)!
      const { name } = part
      if (name === 'type') this.#type(part, kind === 'string' ? decodeString(this.#bytes, start, end, escaped) ?? '' : kind === 'null' ? undefined : '')
      else if (name === 'uuid') part.hasUuid = kind !== 'null'
      else if (name !== undefined && MEDIA_MEMBERS.has(name)) {
        if (kind === 'string') this.#url(part, name, { start, end, escaped })
        else if (kind === 'null') part.nulls.push(name)
        else part.urls.set(name, undefined)
      }
    }
  }

  /** A container begins. @returns whether to look into it */
  open (depth: number, array: boolean, start: number): boolean {
    const inside = depth + 1
    const container = this.#kinds[depth]
    this.#kinds[inside] = OTHER
    if (container === LIST) {
      const index = ++this.#indices[depth]!
      if (!array) this.#beginPart(inside, this.#lists.at(-1)!, index, start)
    } else if (container === PART) {
      const part = this.#parts.at(-1)!
      const { name } = part
      if (name === 'type') part.type = ''
      else if (name === 'uuid') part.hasUuid = true
      else if (name === 'content' && array && this.#parts.length <= MAX_NESTING && part.index !== -1) this.#beginList(inside, `${where(part)}.content`)
      else if (name !== undefined && MEDIA_MEMBERS.has(name)) {
        part.urls.set(name, undefined)
        if (!array) this.#kinds[inside] = OBJECT
        this.#innerSeen = []
      }
    }
    return this.#kinds[inside] !== OTHER
  }

  close (depth: number, end: number): void {
    const container = this.#kinds[depth + 1]
    if (container === PART) this.#endPart(end)
    else if (container === LIST) this.#lists.pop()
  }

  #beginList (inside: number, path: string): void {
    this.#kinds[inside] = LIST
    this.#indices[inside] = -1
    this.#lists.push(path)
  }

  #beginPart (inside: number, list: string, index: number, start: number): void {
    this.#kinds[inside] = PART
    this.#parts.push({ list, index, start, before: this.found.length, type: undefined, hasUuid: false, name: undefined, seen: [], urls: new Map(), nulls: [] })
  }

  #endPart (end: number): void {
    const part = this.#parts.pop()!
    const { urls, nulls, hasUuid, before, start } = part
    const type = mediaTypeOf({ type: part.type, hasUuid, has: member => urls.has(member) || (hasUuid && nulls.includes(member)) })
    if (type === undefined) return
    this.found.length = before
    if (before === MAX_MEDIA) throw epdError('EPD_ERR_TOO_MANY_MEDIA', [MAX_MEDIA], { param: 'messages' })
    const member = sourcesOf(type).find(name => urls.get(name) !== undefined)
    const outermost = this.#parts[0] ?? part
    this.found.push({
      message: this.#message,
      part: Math.max(0, outermost.index),
      path: where(part),
      type,
      url: member === undefined ? undefined : urls.get(member),
      member,
      span: { start, end }
    })
  }

  #type (part: Part, type: string | undefined): void {
    part.type = type
    if (type !== undefined && isEmbedded(type)) this.privileged.push({ param: where(part), kind: 'embeddings' })
  }

  #innerText (text: Text): void {
    const part = this.#parts.at(-1)!
    const name = part.name!
    // Of the two, engines read `url` first.
    if (this.#inner === 'data' && part.urls.get(name) !== undefined) this.#refuseLease(part, text)
    else if (this.#inner === 'url' || this.#inner === 'data') this.#url(part, name, text)
  }

  #url (part: Part, member: string, url: Text): void {
    this.#refuseLease(part, url)
    part.urls.set(member, url)
  }

  #refuseLease (part: Part, { start, end }: Text): void {
    if (!isLeaseUrl(this.#bytes, start, end)) return
    const param = where(part)
    throw epdError('EPD_ERR_INVALID_MEDIA', [`${param}: ${LEASE_SCHEME} URLs are not for clients to send`], { param })
  }

  #once (seen: string[], name: string): void {
    if (seen.includes(name)) {
      const param = `${where(this.#parts.at(-1)!)}.${name}`
      throw epdError('EPD_ERR_DUPLICATE_MEMBER', [param], { param })
    }
    seen.push(name)
  }
}

function where ({ list, index }: Part): string {
  return index === -1 ? list : `${list}[${index}]`
}
