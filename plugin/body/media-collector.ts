import type { Privileged } from '../../adapters/adapter.ts'
import { isEmbedded, LOOSE, MAX_NESTING, MEDIA, mediaTypeOf, MESSAGE_LISTS, PART_LISTS, sourcesOf, SOURCES } from '../../adapters/wire/media.ts'
import { LEASE_SCHEME } from '../../adapters/wire/results.ts'
import { epdError } from '../errors.ts'
import { charactersIn, decodeString, type ScalarKind } from './json-scanner.ts'
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
  /** It stands where no encoder looks for it. */
  readonly apart: boolean
}

/** A part that is being read; of a member that is read whole, the message around it, too. */
interface Part {
  readonly list: string
  readonly index: number
  readonly start: number
  /** Media found before it: what its own list of parts holds counts only if it is no media itself. */
  readonly before: number
  type: string | undefined
  hasUuid: boolean
  hasRole: boolean
  /** The member that is being read. */
  name: string | undefined
  /** Members that are read by name, to find one that is there twice: parsers differ in which of them they believe. */
  readonly seen: string[]
  /** The same of the object that holds the media. */
  innerSeen: string[]
  /** Its media members, with the URL of those that have one. */
  readonly urls: Map<string, Text | undefined>
  readonly nulls: string[]
  /** Of its text, at least. */
  characters: number
}

// What a container is.
const OTHER = 0
const LIST = 1
const PART = 2
/** The value of a media member: `{ url }`. */
const OBJECT = 3

const MEDIA_MEMBERS: ReadonlySet<string> = new Set([...MEDIA.keys(), ...SOURCES])
const READ: ReadonlySet<string> = new Set(['type', 'uuid', 'role', 'content', 'output', 'prompt_embeds', ...MEDIA_MEMBERS])
const MAX_MEDIA = 512

/** Notes the media among the parts of messages, by the grammar of adapters/wire/media.ts, while the scanner reads them. */
export class MediaCollector {
  readonly found: FoundMedia[] = []
  /** What only a gateway may send to some engines. */
  readonly privileged: Privileged[] = []

  /** Parts of messages, and the characters of their text, at least. */
  parts = 0
  characters = 0

  readonly #bytes: Buffer
  #message = -1
  /** Parts stand in messages that are read here. */
  #whole = false
  #apart = false
  /** All that is in it is media of this type. */
  #loose: string | undefined
  /** Kinds of the open containers, and of lists the last part's index, by the depth of what is in them. */
  readonly #kinds: number[] = []
  readonly #indices: number[] = []
  /** Lists of parts that are open, by their path; one more than the parts that are open, in a list. */
  readonly #lists: string[] = []
  readonly #parts: Part[] = []
  /** Members of the object that holds the media. */
  #inner: string | undefined

  constructor (bytes: Buffer) {
    this.#bytes = bytes
  }

  /** The parts of a message begin: a list of them, or one alone. */
  begin (depth: number, message: number, path: string, array: boolean, start: number): void {
    this.#message = message
    this.#whole = this.#apart = false
    this.#loose = undefined
    if (array) this.#beginList(depth + 1, path)
    else this.#beginPart(depth + 1, path, -1, start)
  }

  /** A top-level member begins: messages, parts, or media, in a list or one alone. */
  beginMember (depth: number, name: string, array: boolean, start: number): void {
    this.#whole = true
    this.#apart = !MESSAGE_LISTS.has(name)
    this.#loose = LOOSE.get(name)
    if (array) this.#beginList(depth + 1, name)
    else this.#beginPart(depth + 1, name, -1, start)
  }

  /** A text is media. */
  loose (path: string, url: Text): void {
    this.#refuseLease(path, url)
    const type = LOOSE.get(path) ?? this.#loose!
    this.#found({ message: 0, part: 0, path, type, url, member: type, span: { start: url.start - 1, end: url.end + 1 }, apart: true })
  }

  key (depth: number, name: string | undefined): void {
    if (this.#kinds[depth] === OBJECT) {
      this.#inner = name
      if (name === 'url' || name === 'data') this.#once(this.#parts.at(-1)!.innerSeen, name)
      return
    }
    const part = this.#parts.at(-1)!
    part.name = name
    if (name === undefined || !READ.has(name)) return
    this.#once(part.seen, name)
    if (name === 'role') part.hasRole = true
    else if (name === 'uuid') this.privileged.push({ param: `${where(part)}.uuid`, kind: 'uuid' })
    else if (isEmbedded(name)) this.privileged.push({ param: `${where(part)}.${name}`, kind: 'embeddings' })
  }

  scalar (depth: number, kind: ScalarKind, start: number, end: number, escaped: boolean): void {
    const container = this.#kinds[depth]
    if (container === LIST) {
      const index = ++this.#indices[depth]!
      this.#countPart()
      if (this.#loose !== undefined && kind === 'string') this.loose(`${this.#lists.at(-1)!}[${index}]`, { start, end, escaped })
    } else if (container === OBJECT) {
      if (kind === 'string') this.#innerText({ start, end, escaped })
    } else {
      const part = this.#parts.at(-1)!
      const { name } = part
      if (name === 'type') this.#type(part, kind === 'string' ? decodeString(this.#bytes, start, end, escaped) ?? '' : kind === 'null' ? undefined : '')
      else if (name === 'uuid') part.hasUuid = kind !== 'null'
      else if (name === 'text' && kind === 'string') part.characters += charactersIn(end - start, escaped)
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
      const list = this.#lists.at(-1)!
      if (!array) this.#beginPart(inside, list, index, start)
      else if (this.#loose !== undefined && this.#lists.length <= MAX_NESTING) this.#beginList(inside, `${list}[${index}]`)
    } else if (container === OBJECT) {
      const part = this.#parts.at(-1)!
      if (array && part.name === 'source' && this.#inner === 'content' && this.#mayNest(part)) this.#beginList(inside, `${where(part)}.source.content`)
    } else if (container === PART) {
      const part = this.#parts.at(-1)!
      const { name } = part
      if (name === 'type') part.type = ''
      else if (name === 'uuid') part.hasUuid = true
      else if (name !== undefined && this.#holdsParts(name) && this.#mayNest(part)) {
        const path = `${where(part)}.${name}`
        if (array) this.#beginList(inside, path)
        else if (this.#isMessage) this.#beginPart(inside, path, -1, start)
      } else if (name !== undefined && MEDIA_MEMBERS.has(name)) {
        part.urls.set(name, undefined)
        if (!array) this.#kinds[inside] = OBJECT
        part.innerSeen = []
      }
    }
    return this.#kinds[inside] !== OTHER
  }

  close (depth: number, end: number): void {
    const container = this.#kinds[depth + 1]
    if (container === PART) this.#endPart(end)
    else if (container === LIST) this.#lists.pop()
  }

  /** Of messages that are a list; what is in a part counts with it. */
  #countPart (): void {
    if (!this.#whole && this.#lists.length <= 1) this.parts++
  }

  /** What is being read is a message. */
  get #isMessage (): boolean {
    return this.#whole && this.#parts.length === 1
  }

  #holdsParts (name: string): boolean {
    return this.#isMessage ? PART_LISTS.has(name) : name === 'content'
  }

  /** One part alone, which is no message, has no parts. */
  #mayNest ({ index }: Part): boolean {
    return this.#loose === undefined && (this.#isMessage || (index !== -1 && this.#parts.length <= MAX_NESTING + (this.#whole ? 1 : 0)))
  }

  #beginList (inside: number, path: string): void {
    this.#kinds[inside] = LIST
    this.#indices[inside] = -1
    this.#lists.push(path)
  }

  #beginPart (inside: number, list: string, index: number, start: number): void {
    this.#kinds[inside] = PART
    this.#parts.push({ list, index, start, before: this.found.length, type: undefined, hasUuid: false, hasRole: false, name: undefined, seen: [], innerSeen: [], urls: new Map(), nulls: [], characters: 0 })
    this.#countPart()
  }

  #endPart (end: number): void {
    const part = this.#parts.pop()!
    const { urls, nulls, hasUuid, before, start } = part
    const isMessage = this.#whole && this.#parts.length === 0
    if (isMessage && part.hasRole && this.#loose === undefined) return
    const type = this.#loose ?? mediaTypeOf({ type: part.type, hasUuid, has: member => urls.has(member) || (hasUuid && nulls.includes(member)) })
    if (type === undefined) {
      if (!this.#whole && this.#parts.length === 0) this.characters += part.characters
      return
    }
    this.found.length = before
    const member = sourcesOf(type).find(name => urls.get(name) !== undefined)
    const outermost = this.#parts[this.#whole ? 1 : 0] ?? part
    this.#found({
      message: this.#loose !== undefined ? 0 : this.#whole ? Math.max(0, (this.#parts[0] ?? part).index) : this.#message,
      part: isMessage ? 0 : Math.max(0, outermost.index),
      path: where(part),
      type,
      url: member === undefined ? undefined : urls.get(member),
      member,
      span: { start, end },
      apart: this.#apart || isMessage
    })
  }

  #found (media: FoundMedia): void {
    if (this.found.length === MAX_MEDIA) throw epdError('EPD_ERR_TOO_MANY_MEDIA', [MAX_MEDIA], { param: 'messages' })
    this.found.push(media)
  }

  #type (part: Part, type: string | undefined): void {
    part.type = type
    if (type !== undefined && isEmbedded(type)) this.privileged.push({ param: where(part), kind: 'embeddings' })
  }

  #innerText (text: Text): void {
    const part = this.#parts.at(-1)!
    const name = part.name!
    // Of the two, engines read `url` first.
    if (this.#inner === 'data' && part.urls.get(name) !== undefined) this.#refuseLease(where(part), text)
    else if (this.#inner === 'url' || this.#inner === 'data') this.#url(part, name, text)
  }

  #url (part: Part, member: string, url: Text): void {
    this.#refuseLease(where(part), url)
    part.urls.set(member, url)
  }

  #refuseLease (param: string, { start, end }: Text): void {
    if (!isLeaseUrl(this.#bytes, start, end)) return
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
