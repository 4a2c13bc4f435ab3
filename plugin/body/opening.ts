import { decodeString, JsonScanner, type JsonVisitor, type ScalarKind } from './json-scanner.ts'

/** How much is scanned between two looks at what was found, in bytes. */
const STEP = 1_024
/** Depths at which things stand: [{ role }] */
const MESSAGE = 1
const MEMBER = 2

/** How a conversation begins: its messages up to the first that is not the application's own (a system or developer message). */
export interface Opening {
  /** Index of its last message. */
  readonly message: number
  /** Where it ends, in bytes. */
  readonly end: number
}

/** @param list messages, known to be JSON @returns undefined when it does not end before `limit` */
export function openingOf (list: Buffer, limit: number): Opening | undefined {
  const reader = new OpeningReader(list)
  const scanner = new JsonScanner(list, reader)
  let at = 0
  do at = Math.min(limit, at + STEP)
  while (!scanner.run(at) && reader.found === undefined && at < limit)
  return reader.found
}

class OpeningReader implements JsonVisitor {
  found: Opening | undefined
  readonly #bytes: Buffer
  #message = -1
  #isRole = false
  #isOwn = false

  constructor (bytes: Buffer) {
    this.#bytes = bytes
  }

  key (_depth: number, start: number, end: number, escaped: boolean): void {
    this.#isRole = end - start === 4 && decodeString(this.#bytes, start, end, escaped) === 'role'
  }

  scalar (depth: number, _kind: ScalarKind, start: number, end: number, escaped: boolean): void {
    if (depth === MESSAGE) this.#message++
    if (depth !== MEMBER || !this.#isRole) return
    const role = decodeString(this.#bytes, start, end, escaped)
    this.#isOwn = role === 'system' || role === 'developer'
  }

  open (depth: number, array: boolean): boolean {
    if (depth !== MESSAGE) return depth === 0 && array
    this.#message++
    this.#isOwn = false
    return !array
  }

  close (depth: number, end: number): void {
    if (depth === MESSAGE && !this.#isOwn) this.found ??= { message: this.#message, end }
  }
}
