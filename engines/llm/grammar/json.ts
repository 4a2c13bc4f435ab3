/** JSON as automata. Texts are as models write them: at most a space, or a line break and an indent, between two tokens. */
import { after, choice, DEAD, EMPTY, later, letter, letters, oneOf, optional, repeat, sequence, words, type Letter, type Node } from './automaton.ts'

/** Digits before and behind the decimal point: doubles keep so many. */
const DIGITS = 15
const MAX_INDENT = 32

export const SPACE = choice(EMPTY, words(' '), sequence(words('\n'), repeat(words(' '), 0, MAX_INDENT)))
const [QUOTE, BACKSLASH] = Buffer.from('"\\') as unknown as [number, number]

/** Adds every character that strings may hold unescaped; each leads to `end`. */
function addCharacters (root: Letter, end: Letter): void {
  for (let byte = 0x20; byte < 0x80; byte++) if (byte !== QUOTE && byte !== BACKSLASH) root.next.set(byte, end)
  const [one, two, three] = [letter(), letter(), letter()]
  const add = (from: Letter, low: number, high: number, to: Letter): void => { for (let byte = low; byte <= high; byte++) from.next.set(byte, to) }
  add(one, 0x80, 0xbf, end)
  add(two, 0x80, 0xbf, one)
  add(three, 0x80, 0xbf, two)
  add(root, 0xc2, 0xdf, one)
  add(root, 0xe1, 0xef, two)
  add(root, 0xf1, 0xf3, three)
  // UTF-8 has one spelling for each character, and none for surrogates and what lies behind U+10FFFF.
  for (const [lead, low, high, to] of [[0xe0, 0xa0, 0xbf, one], [0xed, 0x80, 0x9f, one], [0xf0, 0x90, 0xbf, two], [0xf4, 0x80, 0x8f, two]] as const) {
    const second = letter()
    add(second, low, high, to)
    root.next.set(lead, second)
  }
}

function character (): Node {
  const root = letter()
  const end = letter(true)
  addCharacters(root, end)
  return choice(letters(root), sequence(words('\\'), choice(words('"', '\\', '/', 'b', 'f', 'n', 'r', 't'), sequence(words('u00'), oneOf('01'), oneOf('09', 'af')))))
}

const CHARACTER = character()

/** A string of so many characters. */
export function string (min = 0, max = Infinity): Node {
  return sequence(words('"'), repeat(CHARACTER, min, max), words('"'))
}

/** A string that is none of these; without escapes, where there are any. */
export function stringExcept (names: readonly string[]): Node {
  if (names.length === 0) return string()
  const any = letter()
  addCharacters(any, any)
  any.next.set(QUOTE, letter(true))
  const root = letter(false, any)
  for (const name of names) {
    let at = root
    for (const byte of Buffer.from(name)) {
      const base = after(at, byte)
      // A name that has to be escaped, or one in another's place: such a string can't be written anyway.
      if (base === undefined) break
      const next = at.next.get(byte) ?? letter(false, base)
      at.next.set(byte, next)
      at = next
    }
    if (at.base === any) at.next.set(QUOTE, DEAD)
  }
  return sequence(words('"'), letters(root))
}

const DIGIT = oneOf('09')
const FRACTION = sequence(words('.'), repeat(DIGIT, 1, DIGITS))
const NATURAL = choice(words('0'), sequence(oneOf('19'), repeat(DIGIT, 0, DIGITS - 1)))
export const INTEGER = sequence(optional(words('-')), NATURAL)
export const NUMBER = sequence(INTEGER, optional(FRACTION), optional(sequence(words('e', 'E'), optional(words('+', '-')), repeat(DIGIT, 1, 2))))

/** Numbers of as many digits, from one text to another. */
function between (low: string, high: string): Node {
  if (low === '') return EMPTY
  const [first, last] = [Number(low[0]), Number(high[0])]
  const [afterLow, afterHigh] = [low.slice(1), high.slice(1)]
  if (first === last) return sequence(words(low[0] as string), between(afterLow, afterHigh))
  const nodes = [sequence(words(low[0] as string), between(afterLow, '9'.repeat(afterLow.length))), sequence(words(high[0] as string), between('0'.repeat(afterHigh.length), afterHigh))]
  if (last - first > 1) nodes.push(sequence(oneOf(`${first + 1}${last - 1}`), repeat(DIGIT, afterLow.length, afterLow.length)))
  return choice(...nodes)
}

/** Natural numbers of the range; none where it is empty. */
function naturals (low: number, high: number): Node[] {
  const nodes: Node[] = []
  for (let digits = 1; digits <= DIGITS; digits++) {
    const from = Math.max(low, digits === 1 ? 0 : 10 ** (digits - 1))
    const to = Math.min(high, 10 ** digits - 1)
    if (from <= to) nodes.push(between(String(from), String(to)))
  }
  return nodes
}

const signed = (positive: readonly Node[], negative: readonly Node[]): Node[] => negative.length === 0 ? [...positive] : [...positive, sequence(words('-'), choice(...negative))]

/** Integers from `min` to `max`; undefined when there is none. */
export function integers (min: number, max: number): Node | undefined {
  const nodes = signed(naturals(Math.max(0, Math.ceil(min)), Math.floor(max)), naturals(Math.max(1, Math.ceil(-max)), Math.floor(-min)))
  return nodes.length === 0 ? undefined : choice(...nodes)
}

/** Decimal numbers from `min` to `max`: those whose integer part alone says that they are in between, and the bounds themselves if they are integers. */
export function numbers (min: number, max: number): Node | undefined {
  const withFraction = (nodes: readonly Node[]): Node[] => nodes.length === 0 ? [] : [sequence(choice(...nodes), optional(FRACTION))]
  const whole = integers(min, max)
  const nodes = signed(withFraction(naturals(Math.max(0, Math.ceil(min)), Math.floor(max) - 1)), withFraction(naturals(Math.max(0, Math.ceil(-max)), Math.floor(-min) - 1)))
  if (whole !== undefined) nodes.push(whole)
  return nodes.length === 0 ? undefined : choice(...nodes)
}

const digits = (count: number): Node => repeat(DIGIT, count, count)
const hex = (count: number): Node => repeat(oneOf('09', 'af'), count, count)
/** Days that every month has. */
const DATE = sequence(digits(4), words('-'), words(...numerals(1, 12)), words('-'), words(...numerals(1, 28)))
const TIME = sequence(words(...numerals(0, 23)), words(':'), words(...numerals(0, 59)), words(':'), words(...numerals(0, 59)), optional(sequence(words('.'), repeat(DIGIT, 1, 6))), choice(words('Z'), sequence(words('+', '-'), words(...numerals(0, 13)), words(':'), words(...numerals(0, 59)))))

function numerals (low: number, high: number): string[] {
  return Array.from({ length: high - low + 1 }, (_, i) => String(low + i).padStart(2, '0'))
}

const quoted = (node: Node): Node => sequence(words('"'), node, words('"'))

/** Strings by their `format`. */
export const FORMATS: ReadonlyMap<string, Node> = new Map([
  ['date', quoted(DATE)],
  ['time', quoted(TIME)],
  ['date-time', quoted(sequence(DATE, words('T'), TIME))],
  ['uuid', quoted(sequence(hex(8), words('-'), hex(4), words('-'), hex(4), words('-'), hex(4), words('-'), hex(12)))]
])

const COMMA = sequence(words(','), SPACE)
const COLON = sequence(words(':'), optional(words(' ')))

/** A list of `min` to `max` items, all of one kind. */
export function list (item: Node, min: number, max: number): Node {
  const close = sequence(SPACE, words(']'))
  const some = sequence(SPACE, item, repeat(sequence(COMMA, item), Math.max(min - 1, 0), max - 1), close)
  return sequence(words('['), choice(...min === 0 ? [words(']')] : [], ...max === 0 ? [] : [some]))
}

/** A list of exactly these items. */
export function tuple (items: readonly Node[]): Node {
  return items.length === 0 ? words('[]') : sequence(words('['), SPACE, ...items.flatMap((item, i) => i === 0 ? [item] : [COMMA, item]), SPACE, words(']'))
}

export interface Member {
  readonly name: string
  readonly value: Node
  readonly required: boolean
}

/** An object with these members in this order, and behind them others whose values are `others`. */
export function object (members: readonly Member[], others: Node | undefined): Node {
  const close = sequence(SPACE, words('}'))
  const other = others === undefined ? undefined : sequence(stringExcept(members.map(member => member.name)), COLON, others)
  let first = choice(words('}'), ...other === undefined ? [] : [sequence(SPACE, other, repeat(sequence(COMMA, other), 0, Infinity), close)])
  let more = choice(close, ...other === undefined ? [] : [sequence(repeat(sequence(COMMA, other), 1, Infinity), close)])
  for (const { name, value, required } of [...members].reverse()) {
    const member = sequence(words(JSON.stringify(name)), COLON, value)
    const [asFirst, asMore] = [sequence(SPACE, member, more), sequence(COMMA, member, more)]
    first = required ? asFirst : choice(asFirst, first)
    more = required ? asMore : choice(asMore, more)
  }
  return sequence(words('{'), first)
}

const value = later()
export const ANY_OBJECT = object([], value)
export const ANY_LIST = list(value, 0, Infinity)
export const ANY = value.node = choice(ANY_OBJECT, ANY_LIST, string(), NUMBER, words('true', 'false', 'null'))
