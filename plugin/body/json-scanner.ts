import { epdError } from '../errors.ts'
import { LongStrings } from './long-strings.ts'

export type ScalarKind = 'string' | 'number' | 'true' | 'false' | 'null'

/**
 * What the scanner reports. `depth` counts the containers around a token; offsets are bytes, without the quotes of
 * strings and keys. `escaped`: the string holds backslashes.
 */
export interface JsonVisitor {
  key (depth: number, start: number, end: number, escaped: boolean): void
  scalar (depth: number, kind: ScalarKind, start: number, end: number, escaped: boolean): void
  /** @returns whether to report what is in the container */
  open (depth: number, array: boolean, start: number): boolean
  close (depth: number, end: number): void
}

/** UTF-16 code units of a string, at least: an escape of one takes six bytes, a letter in UTF-8 three. */
export function charactersIn (bytes: number, escaped: boolean): number {
  return bytes / (escaped ? 6 : 3)
}

// What may come next; from VALUE_OR_END on, the end of the container too.
const NOTHING = 0
const IN_STRING = 1
const KEY = 2
const COLON = 3
const VALUE = 4
const VALUE_OR_END = 5
const KEY_OR_END = 6
const COMMA_OR_END = 7

// Kinds of containers, by the byte that closes them.
const OBJECT = 0x7d
const ARRAY = 0x5d

/** Strings longer than this are skipped by memory search. */
const SHORT_STRING = 160
/** In digits. A limit keeps one token from stalling the process. */
const MAX_NUMBER = 4096
const MAX_DEPTH = 256

const LITERALS: Readonly<Record<number, { text: Buffer, kind: ScalarKind }>> = {
  0x74: { text: Buffer.from('true'), kind: 'true' },
  0x66: { text: Buffer.from('false'), kind: 'false' },
  0x6e: { text: Buffer.from('null'), kind: 'null' }
}

/**
 * Checks that bytes are one JSON text (RFC 8259) and reports the tokens of the containers that its visitor wants to look
 * into. Makes no strings, does not recurse, and can stop anywhere: call `run` with growing limits until it returns true.
 */
export class JsonScanner {
  readonly #bytes: Buffer
  readonly #visitor: JsonVisitor
  readonly #stack: number[] = [0]
  #longStrings: LongStrings | undefined
  #depth = 0
  /** Tokens down to this depth are reported. */
  #watch = 1
  #pos = 0
  #state = VALUE
  // The string being read
  #stringStart = 0
  #isKey = false
  #escaped = false

  constructor (bytes: Buffer, visitor: JsonVisitor) {
    this.#bytes = bytes
    this.#visitor = visitor
  }

  get position (): number {
    return this.#pos
  }

  /** Reads up to about `limit`. @returns true at the end. @throws EPD_ERR_INVALID_JSON with the offset */
  run (limit: number): boolean {
    const bytes = this.#bytes
    const until = Math.min(limit, bytes.length)
    while (this.#pos < until) {
      if (this.#state === IN_STRING) {
        this.#readString()
        continue
      }
      const c = bytes[this.#pos]!
      if (c === 0x20 || c === 0x0a || c === 0x0d || c === 0x09) this.#pos++
      else this.#token(c)
    }
    if (this.#pos < bytes.length) return false
    if (this.#state !== NOTHING) this.#fail('unexpected end')
    return true
  }

  #token (c: number): void {
    const closing = this.#stack[this.#depth]!
    if (c === closing && this.#state >= VALUE_OR_END) return this.#close()
    switch (this.#state) {
      case VALUE:
      case VALUE_OR_END:
        return this.#value(c)
      case KEY:
      case KEY_OR_END:
        if (c === 0x22) return this.#startString(true)
        return this.#fail('expected a member name')
      case COLON:
        if (c !== 0x3a) this.#fail('expected a colon')
        this.#pos++
        this.#state = VALUE
        return
      case COMMA_OR_END:
        if (c !== 0x2c) this.#fail(closing === OBJECT ? 'expected a comma or }' : 'expected a comma or ]')
        this.#pos++
        this.#state = closing === OBJECT ? KEY : VALUE
        return
      default:
        this.#fail('unexpected text after the end')
    }
  }

  #value (c: number): void {
    if (c === 0x22) this.#startString(false)
    else if (c === 0x7b) this.#open(false)
    else if (c === 0x5b) this.#open(true)
    else if (c === 0x2d || (c >= 0x30 && c <= 0x39)) this.#number()
    else this.#literal(c)
  }

  #open (array: boolean): void {
    const depth = this.#depth
    if (depth >= MAX_DEPTH) this.#fail(`nested deeper than ${MAX_DEPTH} levels`)
    if (depth <= this.#watch) this.#watch = this.#visitor.open(depth, array, this.#pos) ? depth + 1 : depth
    this.#depth = depth + 1
    this.#stack[this.#depth] = array ? ARRAY : OBJECT
    this.#state = array ? VALUE_OR_END : KEY_OR_END
    this.#pos++
  }

  #close (): void {
    this.#pos++
    this.#depth--
    this.#state = this.#depth === 0 ? NOTHING : COMMA_OR_END
    if (this.#depth > this.#watch) return
    this.#watch = this.#depth
    this.#visitor.close(this.#depth, this.#pos)
  }

  #startString (isKey: boolean): void {
    this.#pos++
    this.#stringStart = this.#pos
    this.#isKey = isKey
    this.#escaped = false
    this.#state = IN_STRING
    // A string that starts on the last byte would otherwise not be seen as unfinished.
    if (this.#pos >= this.#bytes.length) this.#fail('unexpected end of a string')
  }

  /** Reads on in a string: to its end, or a part of it. */
  #readString (): void {
    const bytes = this.#bytes
    const near = Math.min(this.#pos + SHORT_STRING, bytes.length)
    let pos = this.#pos
    for (; pos < near; pos++) {
      const c = bytes[pos]!
      if (c === 0x22) return this.#endString(pos)
      if (c === 0x5c) return this.#escape(pos)
      if (c < 0x20) this.#failAt(pos, 'a control character in a string')
    }
    this.#longStrings ??= new LongStrings(bytes)
    const stop = this.#longStrings.skip(pos)
    if (stop === bytes.length) this.#failAt(stop, 'unexpected end of a string')
    const c = bytes[stop]!
    if (c < 0x20) this.#failAt(stop, 'a control character in a string')
    this.#pos = stop
    if (c === 0x22) this.#endString(stop)
    else if (c === 0x5c) this.#escape(stop)
  }

  #escape (pos: number): void {
    const bytes = this.#bytes
    this.#escaped = true
    const c = bytes[pos + 1]
    if (c === 0x75) {
      for (let i = pos + 2; i < pos + 6; i++) if (!isHex(bytes[i])) this.#failAt(pos, 'a bad escape in a string')
      this.#pos = pos + 6
      // '"', '\', '/', b, f, n, r, t
    } else if (c === 0x22 || c === 0x5c || c === 0x2f || c === 0x62 || c === 0x66 || c === 0x6e || c === 0x72 || c === 0x74) {
      this.#pos = pos + 2
    } else this.#failAt(pos, 'a bad escape in a string')
    if (this.#pos >= bytes.length) this.#fail('unexpected end of a string')
  }

  #endString (end: number): void {
    this.#pos = end + 1
    if (this.#isKey) {
      this.#state = COLON
      if (this.#depth <= this.#watch) this.#visitor.key(this.#depth, this.#stringStart, end, this.#escaped)
    } else this.#scalar('string', this.#stringStart, end)
  }

  #scalar (kind: ScalarKind, start: number, end: number): void {
    this.#state = this.#depth === 0 ? NOTHING : COMMA_OR_END
    if (this.#depth <= this.#watch) this.#visitor.scalar(this.#depth, kind, start, end, kind === 'string' && this.#escaped)
  }

  #literal (c: number): void {
    const literal = LITERALS[c]
    if (literal === undefined) return this.#fail('expected a value')
    const start = this.#pos
    const end = start + literal.text.length
    for (let i = start; i < end; i++) if (this.#bytes[i] !== literal.text[i - start]) this.#fail('expected a value')
    this.#pos = end
    this.#scalar(literal.kind, start, end)
  }

  #number (): void {
    const bytes = this.#bytes
    const start = this.#pos
    let pos = start
    if (bytes[pos] === 0x2d) pos++
    if (bytes[pos] === 0x30) pos++
    else pos = this.#digits(pos)
    if (bytes[pos] === 0x2e) pos = this.#digits(pos + 1)
    if (bytes[pos] === 0x65 || bytes[pos] === 0x45) {
      pos++
      if (bytes[pos] === 0x2b || bytes[pos] === 0x2d) pos++
      pos = this.#digits(pos)
    }
    this.#pos = pos
    this.#scalar('number', start, pos)
  }

  #digits (from: number): number {
    let pos = from
    while (isDigit(this.#bytes[pos])) {
      if (pos++ - from >= MAX_NUMBER) this.#fail(`a number of more than ${MAX_NUMBER} digits`)
    }
    if (pos === from) this.#failAt(pos, 'expected a digit')
    return pos
  }

  #fail (what: string): never {
    this.#failAt(this.#pos, what)
  }

  #failAt (offset: number, what: string): never {
    throw epdError('EPD_ERR_INVALID_JSON', [`The request body is not valid JSON: ${what} at byte ${offset}`])
  }
}

function isDigit (c: number | undefined): boolean {
  return c !== undefined && c >= 0x30 && c <= 0x39
}

function isHex (c: number | undefined): boolean {
  return c !== undefined && ((c >= 0x30 && c <= 0x39) || (c >= 0x41 && c <= 0x46) || (c >= 0x61 && c <= 0x66))
}

/** Longest string that is decoded, in bytes; those that are read by name are far shorter. */
const MAX_DECODED = 64 * 1024

/** The JavaScript value of a JSON string's bytes (without quotes); undefined when it is longer than any string that is read. */
export function decodeString (bytes: Buffer, start: number, end: number, escaped: boolean): string | undefined {
  if (end - start > MAX_DECODED) return undefined
  return escaped ? JSON.parse(bytes.toString('utf8', start - 1, end + 1)) as string : bytes.toString('utf8', start, end)
}
