import { randomUUID } from 'node:crypto'
import { isObject } from '../../../adapters/wire/json.ts'

/** How a model writes calls of tools, by its template: not at all, in a way that is not read here, or as JSON in `<tool_call>`. */
export type ToolFormat = 'none' | 'other' | 'tagged'

export const OPEN = '<tool_call>'
export const CLOSE = '</tool_call>'

/** A template with `<function=` in it writes the calls in another language between the same tags. */
export function toolFormatOf (template: string): ToolFormat {
  if (!/\btools\b/.test(template)) return 'none'
  return template.includes(OPEN) && !template.includes('<function=') ? 'tagged' : 'other'
}

export interface ToolCall {
  readonly id: string
  readonly name: string
  /** JSON. */
  readonly arguments: string
}

/** Finds calls in text that comes in pieces. What is between the tags but no call of a known tool stays text. */
export class ToolCallParser {
  readonly #names: ReadonlySet<string>
  /** Text that may become a call, or white space before one. */
  #held = ''
  #calls = 0

  constructor (names: ReadonlySet<string>) {
    this.#names = names
  }

  /** Calls so far. */
  get calls (): number {
    return this.#calls
  }

  /** Text that can be sent now, and the calls that are whole. */
  push (piece: string): { text: string, calls: ToolCall[] } {
    const calls: ToolCall[] = []
    let text = ''
    let rest = this.#held + piece
    for (;;) {
      const open = rest.indexOf(OPEN)
      if (open < 0) break
      const close = rest.indexOf(CLOSE, open)
      if (close < 0) {
        const end = rest.slice(0, open).trimEnd().length
        text += this.#plain(rest.slice(0, end))
        this.#held = rest.slice(end)
        return { text, calls }
      }
      const call = this.#read(rest.slice(open + OPEN.length, close))
      const end = close + CLOSE.length
      if (call === undefined) text += rest.slice(0, end)
      else {
        text += this.#plain(rest.slice(0, open)).trimEnd()
        calls.push(call)
        this.#calls++
      }
      rest = rest.slice(end)
    }
    const keep = heldLength(rest)
    this.#held = keep === 0 ? '' : rest.slice(-keep)
    return { text: text + this.#plain(keep === 0 ? rest : rest.slice(0, -keep)), calls }
  }

  /** At the end: what was held back is text. */
  flush (): string {
    const held = this.#held
    this.#held = ''
    return this.#calls > 0 && held.trim() === '' ? '' : held
  }

  /** White space behind a call belongs to the call. */
  #plain (text: string): string {
    return this.#calls > 0 && text.trim() === '' ? '' : text
  }

  #read (json: string): ToolCall | undefined {
    let call: unknown
    try {
      call = JSON.parse(json)
    } catch {
      return undefined
    }
    if (!isObject(call) || typeof call.name !== 'string' || !this.#names.has(call.name)) return undefined
    const { arguments: given = {} } = call
    if (!isObject(given)) return undefined
    return { id: `call_${randomUUID().replaceAll('-', '').slice(0, 24)}`, name: call.name, arguments: JSON.stringify(given) }
  }
}

/** Characters at the end that may be white space and the beginning of a tag. */
function heldLength (text: string): number {
  let tag = Math.min(OPEN.length - 1, text.length)
  while (tag > 0 && !text.endsWith(OPEN.slice(0, tag))) tag--
  const before = text.slice(0, text.length - tag)
  return text.length - before.trimEnd().length
}
