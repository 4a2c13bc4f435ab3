import { LEASE_SCHEME } from '../../adapters/wire/results.ts'
import { epdError, type EpdError } from '../errors.ts'
import type { JsonVisitor, ScalarKind } from './json-scanner.ts'
import { isLeaseUrl } from './lease-url.ts'
import { CONTROL_FIELDS, GUARDED_MEMBERS, MEDIA_ROLES, MEDIA_TYPES } from './members.ts'

/** Where a top-level member stands, in bytes. */
export interface Member {
  /** Undefined when it is longer than any name that is ever read. */
  readonly name: string | undefined
  /** The opening quote of the name. */
  readonly start: number
  valueStart: number
  end: number
  kind: ScalarKind | 'object' | 'array'
  escaped: boolean
}

interface Text { readonly start: number, readonly end: number, readonly escaped: boolean }

/** A media part. Its hash and size, which take time, are added later. */
export interface FoundMedia {
  readonly message: number
  readonly part: number
  readonly type: string
  /** The media URL. */
  readonly url: Text
  readonly span: { readonly start: number, readonly end: number }
}

// Depths at which things stand: {messages: [{content: [{image_url: {url}}]}]}
const ROOT = 1
const MESSAGES = 2
const MESSAGE = 3
const CONTENT = 4
const PART = 5
const MEDIA = 6

/** Names that are read at each depth; parsers differ in which of two equal ones they believe. */
const READ: ReadonlyMap<number, { has (name: string): boolean }> = new Map([
  [MESSAGE, new Set(['role', 'content'])],
  [PART, new Set(['type', ...MEDIA_TYPES.keys()])],
  [MEDIA, new Set(['url', 'data'])]
])

/** Longest member name that is read, in bytes: a control field of which each letter is escaped is far shorter. */
const MAX_NAME = 512
/** Longest string that is decoded, in bytes; those that are read by name are far shorter. */
const MAX_DECODED = 64 * 1024
const MAX_MEMBERS = 4096
const MAX_MEDIA = 512

/** Notes the top-level members and the media parts of a chat request while the scanner reads it. */
export class Collector implements JsonVisitor {
  /** Top-level members in order, without control fields. */
  readonly members: Member[] = []
  readonly byName = new Map<string, Member>()
  /** Names of the control fields that were there. */
  readonly stripped: string[] = []
  readonly media: FoundMedia[] = []

  readonly #bytes: Buffer
  /** The name read last at each depth. */
  readonly #names: Array<string | undefined> = []
  /** Names of `READ` seen in the object that is open at each depth. */
  readonly #seen: string[][] = [[], [], [], [], [], [], []]
  #member!: Member
  #message = -1
  #role: string | undefined
  /** Media parts of the message. */
  #found: FoundMedia[] = []
  #part = -1
  #partStart = 0
  #partType: string | undefined
  /** URLs of the part by its media members, in order. */
  readonly #urls = new Map<string, Text>()

  constructor (bytes: Buffer) {
    this.#bytes = bytes
  }

  key (depth: number, start: number, end: number, escaped: boolean): void {
    const name = end - start > MAX_NAME ? undefined : decodeString(this.#bytes, start, end, escaped)
    this.#names[depth] = name
    if (depth === ROOT) this.#rootKey(name, start)
    else if (depth === MESSAGES) this.#guardedKey(name)
    else if (name !== undefined && READ.get(depth)?.has(name) === true) {
      const seen = this.#seen[depth]!
      if (seen.includes(name)) throw duplicate(`${depth === MESSAGE ? `messages[${this.#message}]` : this.#where()}.${name}`)
      seen.push(name)
    }
  }

  scalar (depth: number, kind: ScalarKind, start: number, end: number, escaped: boolean): void {
    const string = kind === 'string'
    switch (depth) {
      case 0: throw notAnObject()
      case ROOT: {
        // Spans of values include the quotes.
        const quote = string ? 1 : 0
        return this.#rootValue(kind, start - quote, end + quote, escaped)
      }
      case MESSAGES:
        if (this.#inMessages) this.#message++
        return
      case MESSAGE:
        if (string && this.#names[MESSAGE] === 'role') this.#role = decodeString(this.#bytes, start, end, escaped)
        return
      case CONTENT:
        this.#part++
        return
      case PART: {
        const name = this.#names[PART]
        if (!string || name === undefined) return
        if (name === 'type') this.#partType = decodeString(this.#bytes, start, end, escaped)
        else if (MEDIA_TYPES.has(name)) this.#url(name, { start, end, escaped })
        return
      }
      case MEDIA:
        if (string) this.#mediaValue({ start, end, escaped })
    }
  }

  open (depth: number, array: boolean, start: number): boolean {
    const enter = this.#enters(depth, array, start)
    if (enter) this.#seen[depth + 1]!.length = 0
    return enter
  }

  close (depth: number, end: number): void {
    if (depth === ROOT) this.#member.end = end
    else if (depth === MESSAGES && this.#inMessages) this.#endMessage()
    else if (depth === CONTENT) this.#endPart(end)
  }

  /** A container begins. @returns whether to look into it */
  #enters (depth: number, array: boolean, start: number): boolean {
    const name = this.#names[depth]
    switch (depth) {
      case 0:
        if (array) throw notAnObject()
        return true
      case ROOT:
        this.#rootValue(array ? 'array' : 'object', start, start, false)
        return array ? this.#inMessages : GUARDED_MEMBERS.includes(name ?? '')
      case MESSAGES:
        if (!this.#inMessages) return false
        this.#message++
        this.#part = -1
        this.#role = undefined
        return !array
      case MESSAGE:
        return array && name === 'content'
      case CONTENT:
        this.#part++
        this.#partStart = start
        this.#partType = undefined
        this.#urls.clear()
        return !array
      case PART:
        return !array && name !== undefined && MEDIA_TYPES.has(name)
      default:
        return false
    }
  }

  get #inMessages (): boolean {
    return this.#names[ROOT] === 'messages'
  }

  #rootKey (name: string | undefined, start: number): void {
    const member: Member = { name, start: start - 1, valueStart: 0, end: 0, kind: 'null', escaped: false }
    this.#member = member
    if (this.members.length + this.stripped.length >= MAX_MEMBERS) throw epdError('EPD_ERR_INVALID_VALUE', [`The request body has more than ${MAX_MEMBERS} members`])
    if (name !== undefined && CONTROL_FIELDS.includes(name)) {
      if (this.stripped.includes(name)) throw duplicate(name)
      this.stripped.push(name)
      return
    }
    if (name !== undefined) {
      if (this.byName.has(name)) throw duplicate(name)
      this.byName.set(name, member)
    }
    this.members.push(member)
  }

  #rootValue (kind: Member['kind'], valueStart: number, end: number, escaped: boolean): void {
    const member = this.#member
    member.kind = kind
    member.valueStart = valueStart
    member.end = end
    member.escaped = escaped
  }

  #guardedKey (name: string | undefined): void {
    if (name === undefined || !CONTROL_FIELDS.includes(name)) return
    const param = `${this.#names[ROOT]}.${name}`
    throw epdError('EPD_ERR_INVALID_VALUE', [`${param} is not for clients to set`], { param })
  }

  #endMessage (): void {
    const found = this.#found
    if (found.length === 0) return
    this.#found = []
    if (this.#role === undefined || !MEDIA_ROLES.has(this.#role)) return
    if (this.media.length + found.length > MAX_MEDIA) throw epdError('EPD_ERR_TOO_MANY_MEDIA', [MAX_MEDIA], { param: 'messages' })
    this.media.push(...found)
  }

  #endPart (end: number): void {
    if (this.#urls.size === 0) return
    // Some clients leave the type out; engines then go by the member.
    const type = this.#partType ?? (this.#seen[PART]!.includes('type') ? undefined : this.#urls.keys().next().value)
    const url = type === undefined ? undefined : this.#urls.get(type)
    if (type === undefined || url === undefined || this.#found.length > MAX_MEDIA) return
    this.#found.push({ message: this.#message, part: this.#part, type, url, span: { start: this.#partStart, end } })
  }

  /** A string in the object of a media member. */
  #mediaValue (url: Text): void {
    const [member, name] = [this.#names[PART]!, this.#names[MEDIA]]
    // Of the two, engines read `url` first.
    if (name === 'data' && this.#urls.has(member)) this.#refuseLease(url)
    else if (name === 'url' || name === 'data') this.#url(member, url)
  }

  #url (member: string, url: Text): void {
    this.#refuseLease(url)
    this.#urls.set(member, url)
  }

  #refuseLease ({ start, end }: Text): void {
    if (!isLeaseUrl(this.#bytes, start, end)) return
    const param = this.#where()
    throw epdError('EPD_ERR_INVALID_MEDIA', [`${param}: ${LEASE_SCHEME} URLs are not for clients to send`], { param })
  }

  #where (): string {
    return `messages[${this.#message}].content[${this.#part}]`
  }
}

function duplicate (param: string): EpdError {
  return epdError('EPD_ERR_DUPLICATE_MEMBER', [param], { param })
}

function notAnObject (): EpdError {
  return epdError('EPD_ERR_INVALID_JSON', ['The request body must be a JSON object'])
}

/** The JavaScript value of a JSON string's bytes (without quotes); undefined when it is longer than any string that is read. */
export function decodeString (bytes: Buffer, start: number, end: number, escaped: boolean): string | undefined {
  if (end - start > MAX_DECODED) return undefined
  return escaped ? JSON.parse(bytes.toString('utf8', start - 1, end + 1)) as string : bytes.toString('utf8', start, end)
}
