import { LEASE_SCHEME } from '../../adapters/wire/results.ts'
import { epdError, type EpdError } from '../errors.ts'
import { memberOf } from './found.ts'
import type { FoundMedia, Member } from './found.ts'
import type { JsonScanner, JsonVisitor, ScalarKind } from './json-scanner.ts'
import { CONTROL_FIELDS, GUARDED_MEMBERS, MEDIA_ROLES, MEDIA_TYPES } from './members.ts'
import { decodeString, looksLike } from './text.ts'

interface Url { start: number, end: number, escaped: boolean }

// Depths at which things stand: {messages: [{content: [{image_url: {url}}]}]}
const ROOT = 1
const MESSAGES = 2
const MESSAGE = 3
const CONTENT = 4
const PART = 5
const MEDIA = 6

/** Longest member name that is looked at, in bytes; none that means something comes near it, escaped or not. */
const MAX_NAME = 512
const MAX_MEMBERS = 4096
const FEW_MEMBERS = 32

/** Takes down the top-level members and the media parts of a chat request while the scanner goes over it. */
export class Collector implements JsonVisitor {
  /** Top-level members in order, without control fields. */
  readonly kept: Member[] = []
  /** Names of the control fields that were there. */
  readonly stripped: string[] = []
  readonly media: FoundMedia[] = []
  /** Offset of the root object's closing brace. */
  rootEnd = 0
  rootStart = 0

  scanner!: JsonScanner
  readonly #bytes: Buffer
  readonly #maxMedia: number

  // Top level
  #names: Set<string | undefined> | undefined
  #member: Member | undefined
  #memberName: string | undefined
  // Message
  #message = -1
  readonly #messageKeys: string[] = []
  #messageKey: string | undefined
  #role: string | undefined
  #found: FoundMedia[] = []
  // Part
  #part = -1
  #partStart = 0
  readonly #partKeys: string[] = []
  #partKey: string | undefined
  #partType: string | undefined
  /** Media members with their URLs, in order; made for the first, as most requests have none. */
  #urls: Map<string, Url> | undefined
  // Object value of a media member
  readonly #mediaKeys: string[] = []
  #mediaKey: string | undefined

  constructor (bytes: Buffer, maxMedia: number) {
    this.#bytes = bytes
    this.#maxMedia = maxMedia
  }

  key (depth: number, start: number, end: number, escaped: boolean): void {
    const name = end - start > MAX_NAME ? undefined : decodeString(this.#bytes, start, end, escaped)
    switch (depth) {
      case ROOT: return this.#rootKey(name, start)
      case MESSAGES: return this.#guardedKey(name)
      case MESSAGE:
        this.#messageKey = name
        if (name === 'role' || name === 'content') once(this.#messageKeys, name, () => `messages[${this.#message}]`)
        return
      case PART:
        this.#partKey = name
        if (name === 'type' || (name !== undefined && MEDIA_TYPES.has(name))) once(this.#partKeys, name, () => this.#where())
        return
      case MEDIA:
        this.#mediaKey = name
        if (name === 'url' || name === 'data') once(this.#mediaKeys, name, () => this.#where())
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
        if (this.#memberName === 'messages') this.#message++
        return
      case MESSAGE:
        if (this.#messageKey === 'role' && string) this.#role = decodeString(this.#bytes, start, end, escaped)
        return
      case CONTENT:
        this.#part++
        return
      case PART:
        if (!string) return
        if (this.#partKey === 'type') this.#partType = decodeString(this.#bytes, start, end, escaped)
        else if (this.#partKey !== undefined && MEDIA_TYPES.has(this.#partKey)) this.#url(this.#partKey, { start, end, escaped })
        return
      case MEDIA:
        if (string && (this.#mediaKey === 'url' || this.#mediaKey === 'data')) this.#mediaValue({ start, end, escaped })
    }
  }

  open (depth: number, array: boolean, start: number): void {
    let enter = false
    switch (depth) {
      case 0:
        if (array) throw notAnObject()
        this.rootStart = start
        enter = true
        break
      case ROOT:
        this.#rootValue(array ? 'array' : 'object', start, start, false)
        enter = array ? this.#memberName === 'messages' : GUARDED_MEMBERS.includes(this.#memberName ?? '')
        break
      case MESSAGES:
        enter = this.#memberName === 'messages' && this.#startMessage(array)
        break
      case MESSAGE:
        enter = array && this.#messageKey === 'content'
        break
      case CONTENT:
        enter = this.#startPart(array, start)
        break
      case PART:
        enter = !array && this.#partKey !== undefined && MEDIA_TYPES.has(this.#partKey)
        if (enter) this.#mediaKeys.length = 0
    }
    this.scanner.watch = enter ? depth + 1 : depth
  }

  close (depth: number, end: number): void {
    this.scanner.watch = depth
    switch (depth) {
      case 0:
        this.rootEnd = end - 1
        return
      case ROOT:
        this.#member!.end = end
        return
      case MESSAGES:
        if (this.#memberName === 'messages') this.#endMessage()
        return
      case CONTENT:
        this.#endPart(end)
    }
  }

  #rootKey (name: string | undefined, start: number): void {
    const index = this.kept.length + this.stripped.length
    if (index >= MAX_MEMBERS) throw epdError('EPD_ERR_INVALID_VALUE', [`The request body has more than ${MAX_MEMBERS} members`])
    const member: Member = { name, index, start: start - 1, valueStart: 0, end: 0, kind: 'null', escaped: false }
    this.#member = member
    this.#memberName = name
    if (name !== undefined && CONTROL_FIELDS.includes(name)) {
      if (this.stripped.includes(name)) throw duplicate(name)
      this.stripped.push(name)
      return
    }
    // Parsers differ in which of two members they believe, so neither is let through.
    if (name !== undefined && this.#isThere(name)) throw duplicate(name)
    this.kept.push(member)
  }

  /** Bodies have a dozen members, which are quicker gone through than hashed; the many of an attack are hashed. */
  #isThere (name: string): boolean {
    if (this.kept.length < FEW_MEMBERS) return memberOf(this.kept, name) !== undefined
    this.#names ??= new Set(this.kept.map(member => member.name))
    const there = this.#names.has(name)
    this.#names.add(name)
    return there
  }

  #rootValue (kind: Member['kind'], start: number, end: number, escaped: boolean): void {
    const member = this.#member!
    member.valueStart = start
    member.end = end
    member.kind = kind
    member.escaped = escaped
  }

  #guardedKey (name: string | undefined): void {
    if (name === undefined || !CONTROL_FIELDS.includes(name)) return
    const param = `${this.#memberName}.${name}`
    throw epdError('EPD_ERR_INVALID_VALUE', [`${param} is not for clients to set`], { param })
  }

  #startMessage (array: boolean): boolean {
    this.#message++
    this.#part = -1
    this.#role = undefined
    this.#messageKeys.length = 0
    return !array
  }

  #endMessage (): void {
    const found = this.#found
    if (found.length === 0) return
    if (this.#role !== undefined && MEDIA_ROLES.has(this.#role)) {
      if (this.media.length + found.length > this.#maxMedia) {
        throw epdError('EPD_ERR_TOO_MANY_MEDIA', [this.#maxMedia], { param: 'messages' })
      }
      this.media.push(...found)
    }
    this.#found = []
  }

  #startPart (array: boolean, start: number): boolean {
    this.#part++
    this.#partStart = start
    this.#partType = undefined
    this.#partKeys.length = 0
    this.#urls?.clear()
    return !array
  }

  #endPart (end: number): void {
    const urls = this.#urls
    if (urls === undefined || urls.size === 0) return
    // Some clients leave the type out; engines then go by the member.
    const type = this.#partType ?? (this.#partKeys.includes('type') ? undefined : urls.keys().next().value)
    const url = type === undefined ? undefined : urls.get(type)
    if (type === undefined || url === undefined) return
    if (this.#found.length > this.#maxMedia) return
    this.#found.push({
      message: this.#message,
      part: this.#part,
      type,
      url: { start: url.start, end: url.end },
      escaped: url.escaped,
      span: { start: this.#partStart, end }
    })
  }

  #mediaValue (url: Url): void {
    const member = this.#partKey!
    // Of the two, engines read `url` first.
    if (this.#mediaKey === 'data' && this.#urls?.has(member) === true) this.#refuseResult(url)
    else this.#url(member, url)
  }

  #url (member: string, url: Url): void {
    this.#refuseResult(url)
    this.#urls ??= new Map()
    this.#urls.set(member, url)
  }

  #refuseResult (url: Url): void {
    if (!looksLike(this.#bytes, url.start, url.end, LEASE_SCHEME)) return
    const param = this.#where()
    throw epdError('EPD_ERR_INVALID_MEDIA', [`${param}: ${LEASE_SCHEME} URLs are not for clients to send`], { param })
  }

  #where (): string {
    return `messages[${this.#message}].content[${this.#part}]`
  }
}

function once (seen: string[], name: string, where: () => string): void {
  if (seen.includes(name)) throw duplicate(`${where()}.${name}`)
  seen.push(name)
}

function duplicate (param: string): EpdError {
  return epdError('EPD_ERR_DUPLICATE_MEMBER', [param], { param })
}

function notAnObject (): EpdError {
  return epdError('EPD_ERR_INVALID_JSON', ['The request body must be a JSON object'])
}
