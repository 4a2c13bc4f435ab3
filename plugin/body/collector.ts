import type { Privileged } from '../../adapters/adapter.ts'
import { APART, LOOSE, MESSAGE_LISTS, PART_LISTS } from '../../adapters/wire/media.ts'
import { epdError, type EpdError } from '../errors.ts'
import { charactersIn, decodeString, type JsonVisitor, type ScalarKind } from './json-scanner.ts'
import { MediaCollector, type FoundMedia } from './media-collector.ts'
import { CONTROL_FIELDS, GUARDED_MEMBERS, refuseControl, type PromptSize } from './members.ts'

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

// Depths at which things stand: {messages: [{content: [...]}]}
const ROOT = 1
const MESSAGES = 2
const MESSAGE = 3

/** Longest member name that is read, in bytes: a control field of which each letter is escaped is far shorter. */
const MAX_NAME = 512
const MAX_MEMBERS = 4096

/** Notes the top-level members of a request while the scanner reads it. What messages hold beside text is the media collector's. */
export class Collector implements JsonVisitor {
  /** Top-level members in order, without control fields. */
  readonly members: Member[] = []
  readonly byName = new Map<string, Member>()
  /** Names of the control fields that were there. */
  readonly stripped: string[] = []

  readonly #bytes: Buffer
  #member!: Member
  #message = -1
  #messages = 0
  #characters = 0
  /** The member of the message that is being read. */
  #name: string | undefined
  /** Members of it that hold parts: parsers differ in which of two equal ones they believe. */
  #seen = ''
  #inParts = false
  /** The media collector reads all of the top-level member. */
  #whole = false
  /** Made for the first content that is no text. */
  #media: MediaCollector | undefined

  constructor (bytes: Buffer) {
    this.#bytes = bytes
  }

  /** A lower bound: messages and their parts, and the characters of their text. */
  get size (): PromptSize {
    const { parts = 0, characters = 0 } = this.#media ?? {}
    return { messages: this.#messages + parts, characters: Math.floor(this.#characters + characters) }
  }

  get media (): readonly FoundMedia[] {
    return this.#media?.found ?? []
  }

  /** What only a gateway may send to some engines. */
  get privileged (): readonly Privileged[] {
    return this.#media?.privileged ?? []
  }

  key (depth: number, start: number, end: number, escaped: boolean): void {
    const name = end - start > MAX_NAME ? undefined : decodeString(this.#bytes, start, end, escaped)
    if (depth === ROOT) this.#rootKey(name, start)
    else if (this.#whole) this.#media!.key(depth, name)
    else if (depth === MESSAGES) refuseControl(this.#member.name, name)
    else if (depth === MESSAGE) this.#messageKey(name)
    else this.#media!.key(depth, name)
  }

  scalar (depth: number, kind: ScalarKind, start: number, end: number, escaped: boolean): void {
    if (depth > MESSAGE || this.#whole) return this.#media!.scalar(depth, kind, start, end, escaped)
    if (depth === ROOT) {
      // Spans of values include the quotes.
      const quote = kind === 'string' ? 1 : 0
      this.#rootValue(kind, start - quote, end + quote, escaped)
      if (quote === 1 && LOOSE.has(this.#member.name ?? '')) this.#readMedia().loose(this.#member.name!, { start, end, escaped })
    } else if (depth === MESSAGES) this.#message++
    else if (depth === MESSAGE && kind === 'string' && this.#name === 'content') this.#characters += charactersIn(end - start, escaped)
    else if (depth === 0) throw notAnObject()
  }

  open (depth: number, array: boolean, start: number): boolean {
    if (this.#whole) return this.#media!.open(depth, array, start)
    switch (depth) {
      case 0:
        if (array) throw notAnObject()
        return true
      case ROOT: {
        this.#rootValue(array ? 'array' : 'object', start, start, false)
        const { name = '' } = this.#member
        this.#message = -1
        // Most often messages are text: these are read here.
        if (name === 'messages' && array) return true
        this.#whole = MESSAGE_LISTS.has(name) || APART.has(name) || LOOSE.has(name)
        if (this.#whole) this.#readMedia().beginMember(depth, name, array, start)
        return this.#whole || (!array && GUARDED_MEMBERS.includes(name))
      }
      case MESSAGES:
        this.#message++
        this.#seen = ''
        return !array && this.#member.name === 'messages'
      case MESSAGE:
        this.#inParts = PART_LISTS.has(this.#name ?? '')
        if (!this.#inParts) return false
        this.#readMedia().begin(depth, this.#message, `${this.#where()}.${this.#name}`, array, start)
        return true
      default:
        return this.#media!.open(depth, array, start)
    }
  }

  close (depth: number, end: number): void {
    if (depth === ROOT) {
      this.#member.end = end
      if (this.#member.name === 'messages') this.#messages = this.#message + 1
      if (this.#whole) this.#media!.close(depth, end)
      this.#whole = false
    } else if (depth > MESSAGE || this.#whole || (depth === MESSAGE && this.#inParts)) this.#media!.close(depth, end)
  }

  #readMedia (): MediaCollector {
    return (this.#media ??= new MediaCollector(this.#bytes))
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

  #messageKey (name: string | undefined): void {
    this.#name = name
    if (name === undefined || !PART_LISTS.has(name)) return
    if (this.#seen.includes(name)) throw duplicate(`${this.#where()}.${name}`)
    this.#seen += name
  }

  #where (): string {
    return `${this.#member.name}[${this.#message}]`
  }
}

function duplicate (param: string): EpdError {
  return epdError('EPD_ERR_DUPLICATE_MEMBER', [param], { param })
}

function notAnObject (): EpdError {
  return epdError('EPD_ERR_INVALID_JSON', ['The request body must be a JSON object'])
}
