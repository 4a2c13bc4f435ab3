import { LEASE_SCHEME } from '../../adapters/wire/results.ts'
import { epdError } from '../errors.ts'
import { decodeString, type ScalarKind } from './json-scanner.ts'
import { isLeaseUrl } from './lease-url.ts'
import { MEDIA_TYPES } from './members.ts'

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
const CONTENT = 4
const PART = 5
const MEDIA = 6

/** Names that are read at each depth; parsers differ in which of two equal ones they believe. */
const READ: ReadonlyMap<number, { has (name: string): boolean }> = new Map([
  [PART, new Set(['type', ...MEDIA_TYPES.keys()])],
  [MEDIA, new Set(['url', 'data'])]
])

const MAX_MEDIA = 512

/** Notes the media parts in the contents of messages while the scanner reads them. */
export class MediaCollector {
  readonly found: FoundMedia[] = []

  readonly #bytes: Buffer
  #message = -1
  #part = -1
  #partStart = 0
  #partType: string | undefined
  /** URLs of the part by its media members, in order. */
  readonly #urls = new Map<string, Text>()
  /** The name read last at each depth. */
  readonly #names: Array<string | undefined> = []
  /** Names of `READ` seen in the object that is open at each depth. */
  readonly #seen: string[][] = [[], [], [], [], [], [], []]

  constructor (bytes: Buffer) {
    this.#bytes = bytes
  }

  /** The content of this message begins. */
  enter (message: number): void {
    this.#message = message
    this.#part = -1
  }

  key (depth: number, name: string | undefined): void {
    this.#names[depth] = name
    if (name === undefined || READ.get(depth)?.has(name) !== true) return
    const seen = this.#seen[depth]!
    if (seen.includes(name)) {
      const param = `${this.#where()}.${name}`
      throw epdError('EPD_ERR_DUPLICATE_MEMBER', [param], { param })
    }
    seen.push(name)
  }

  scalar (depth: number, kind: ScalarKind, start: number, end: number, escaped: boolean): void {
    if (depth === CONTENT) this.#part++
    if (kind !== 'string' || depth === CONTENT) return
    const name = this.#names[PART]
    if (depth === MEDIA) this.#mediaValue({ start, end, escaped })
    else if (name === 'type') this.#partType = decodeString(this.#bytes, start, end, escaped)
    else if (name !== undefined && MEDIA_TYPES.has(name)) this.#url(name, { start, end, escaped })
  }

  /** A container begins. @returns whether to look into it */
  open (depth: number, array: boolean, start: number): boolean {
    if (depth < MEDIA) this.#seen[depth + 1]!.length = 0
    if (depth === PART) {
      const name = this.#names[PART]
      return !array && name !== undefined && MEDIA_TYPES.has(name)
    }
    if (depth !== CONTENT) return false
    this.#part++
    this.#partStart = start
    this.#partType = undefined
    this.#urls.clear()
    return !array
  }

  close (depth: number, end: number): void {
    if (depth !== CONTENT || this.#urls.size === 0) return
    // Some clients leave the type out; engines then go by the member.
    const type = this.#partType ?? (this.#seen[PART]!.includes('type') ? undefined : this.#urls.keys().next().value)
    const url = type === undefined ? undefined : this.#urls.get(type)
    if (type === undefined || url === undefined) return
    if (this.found.length === MAX_MEDIA) throw epdError('EPD_ERR_TOO_MANY_MEDIA', [MAX_MEDIA], { param: 'messages' })
    this.found.push({ message: this.#message, part: this.#part, type, url, span: { start: this.#partStart, end } })
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
