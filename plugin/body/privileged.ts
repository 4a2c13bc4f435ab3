/** What a client has written that some engine believes blindly, found when an adapter asks: most requests never pay for it. */
import type { Privileged } from '../../adapters/adapter.ts'
import { decodeString, JsonScanner, type JsonVisitor, type ScalarKind } from './json-scanner.ts'

// Depths in the value of `messages`: [{content: [{uuid}]}]
const MESSAGES = 1
const MESSAGE = 2
const CONTENT = 3
const PART = 4

/** Longest name that is read, in bytes: an escaped letter takes six. */
const MAX_NAME = 256
/** Of members and types: `image_embeds`, `prompt_embeds`, ... vLLM goes by the member too, and a picture object made by Python (`image_pil`) is no JSON. */
const EMBEDDINGS = /_(embeds|pil)$/

/** What a name at issue holds; an escape may hide any letter of it. */
const TRACES = ['uuid', '_embeds', '_pil', '\\u00'].map(text => Buffer.from(text))

/**
 * @param messages JSON text that is known to be JSON
 * @param urls where media URLs stand in it. Of a picture of 5 MB the scan takes 12 ms; what is between its URLs is short.
 */
export function privilegedParts (messages: Buffer, urls: ReadonlyArray<{ readonly start: number, readonly end: number }>): Privileged[] {
  const gaps = [0, ...urls.map(url => url.end)].map((start, i) => messages.subarray(start, urls[i]?.start))
  if (!gaps.some(gap => TRACES.some(trace => gap.includes(trace)))) return []
  const visitor = new PartVisitor(messages)
  new JsonScanner(messages, visitor).run(messages.length)
  return visitor.found
}

class PartVisitor implements JsonVisitor {
  readonly found: Privileged[] = []
  readonly #bytes: Buffer
  #message = -1
  #part = -1
  #name: string | undefined

  constructor (bytes: Buffer) {
    this.#bytes = bytes
  }

  key (depth: number, start: number, end: number, escaped: boolean): void {
    this.#name = this.#text(start, end, escaped)
    if (depth !== PART || this.#name === undefined) return
    if (this.#name === 'uuid') this.#note('uuid')
    else if (EMBEDDINGS.test(this.#name)) this.#note('embeddings')
  }

  scalar (depth: number, kind: ScalarKind, start: number, end: number, escaped: boolean): void {
    if (depth === MESSAGES) this.#message++
    else if (depth === CONTENT) this.#part++
    else if (depth === PART && kind === 'string' && this.#name === 'type' && EMBEDDINGS.test(this.#text(start, end, escaped) ?? '')) this.#note('embeddings')
  }

  open (depth: number, array: boolean): boolean {
    if (depth === MESSAGES) {
      this.#message++
      this.#part = -1
    } else if (depth === CONTENT) this.#part++
    return depth === MESSAGE ? array && this.#name === 'content' : depth < PART
  }

  close (): void {}

  #text (start: number, end: number, escaped: boolean): string | undefined {
    return end - start > MAX_NAME ? undefined : decodeString(this.#bytes, start, end, escaped)
  }

  #note (kind: Privileged['kind']): void {
    const name = kind === 'uuid' || this.#name !== 'type' ? `.${this.#name}` : ''
    this.found.push({ param: `messages[${this.#message}].content[${this.#part}]${name}`, kind })
  }
}
