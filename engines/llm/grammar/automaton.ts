/**
 * What a text may be, read byte by byte: an automaton with a stack, so that it can count and nest. A state is every way to read
 * the text so far; each way is a list of what is left to read.
 */

/** A state of a finite automaton; shared, and cyclic where texts may repeat. */
export interface Letter {
  readonly id: number
  readonly next: Map<number, Letter>
  /** Where other bytes lead. */
  readonly base: Letter | undefined
  final: boolean
}

export type Node = { readonly id: number } & (
  | { readonly kind: 'letters', readonly root: Letter }
  | { readonly kind: 'sequence', readonly nodes: readonly Node[] }
  | { readonly kind: 'choice', readonly nodes: readonly Node[] }
  /** `node` is not empty. */
  | { readonly kind: 'repeat', readonly node: Node, readonly min: number, readonly max: number }
  /** Set when it is known: how nodes refer to those around them. */
  | { readonly kind: 'later', node: Node | undefined }
  /** Any text; after each `trigger` comes `node`. */
  | { readonly kind: 'free', readonly trigger: Uint8Array, readonly node: Node }
)

/** What is left to read: the rest of `node` from `at` on, then `next`. */
interface Rest {
  readonly node: Node
  /** A letter; an index in a sequence, a count of repetitions, the length of a trigger's beginning. */
  readonly at: Letter | number
  readonly next: Rest | undefined
}

export interface State {
  readonly rests: readonly Rest[]
  /** The text may end here. */
  readonly end: boolean
}

/** Ways to read a text that are followed at once. A text that has more of them may go on only in the first ones. */
const MAX_RESTS = 128

let ids = 0

export function letter (final = false, base?: Letter): Letter {
  return { id: ++ids, next: new Map(), base, final }
}

/** Where no text leads on from. */
export const DEAD = letter()

export function after (from: Letter, byte: number): Letter | undefined {
  return from.next.get(byte) ?? from.base?.next.get(byte)
}

export const letters = (root: Letter): Node => ({ id: ++ids, kind: 'letters', root })
export const sequence = (...nodes: readonly Node[]): Node => ({ id: ++ids, kind: 'sequence', nodes })
export const choice = (...nodes: readonly Node[]): Node => nodes.length === 1 ? nodes[0] as Node : ({ id: ++ids, kind: 'choice', nodes })
export const repeat = (node: Node, min: number, max: number): Node => ({ id: ++ids, kind: 'repeat', node, min, max })
export const optional = (node: Node): Node => choice(EMPTY, node)
export const later = (): Extract<Node, { kind: 'later' }> => ({ id: ++ids, kind: 'later', node: undefined })
export const free = (trigger: string, node: Node): Node => ({ id: ++ids, kind: 'free', trigger: Buffer.from(trigger), node })
export const EMPTY: Node = sequence()

/** One of these texts. */
export function words (...texts: readonly string[]): Node {
  const root = letter()
  for (const text of texts) {
    let at = root
    for (const byte of Buffer.from(text)) {
      const next = at.next.get(byte) ?? letter()
      at.next.set(byte, next)
      at = next
    }
    at.final = true
  }
  return letters(root)
}

/** One byte of these ranges, given as pairs of characters: `oneOf('09', 'af')`. */
export function oneOf (...ranges: readonly string[]): Node {
  const root = letter()
  const end = letter(true)
  for (const range of ranges) for (let byte = range.charCodeAt(0); byte <= range.charCodeAt(1); byte++) root.next.set(byte, end)
  return letters(root)
}

/** The state before the first byte. */
export function begin (node: Node): State {
  return new Reading().expand(node, 0, undefined).state()
}

/** The state after one more byte; undefined where the text may not go on like this. */
export function step ({ rests }: State, byte: number): State | undefined {
  const reading = new Reading()
  for (const { node, at, next } of rests) {
    if (node.kind === 'free') {
      const matched = matchedBy(node.trigger, at as number, byte)
      if (matched < node.trigger.length) reading.push({ node, at: matched, next }, true)
      else reading.expand(node.node, 0, { node, at: 0, next })
      continue
    }
    const letter = after(at as Letter, byte)
    if (letter !== undefined) reading.expand(node, letter, next)
  }
  return reading.empty ? undefined : reading.state()
}

/** Equal for states from which the same texts may follow. */
export function keyOf ({ rests, end }: State): string {
  let key = end ? '!' : ''
  for (let rest of rests) {
    for (;;) {
      key += `${rest.node.id}.${typeof rest.at === 'number' ? rest.at : rest.at.id},`
      if (rest.next === undefined) break
      rest = rest.next
    }
    key += ';'
  }
  return key
}

/** How much of the trigger the text ends with. */
function matchedBy (trigger: Uint8Array, matched: number, byte: number): number {
  for (let length = matched; length >= 0; length--) {
    if (trigger[length] !== byte) continue
    if (Buffer.compare(trigger.subarray(0, length), trigger.subarray(matched - length, matched)) === 0) return length + 1
  }
  return 0
}

class Reading {
  readonly #rests: Rest[] = []
  #end = false

  get empty (): boolean {
    return this.#rests.length === 0 && !this.#end
  }

  state (): State {
    return { rests: this.#rests, end: this.#end }
  }

  push (rest: Rest, end = false): void {
    this.#end ||= end
    if (this.#rests.length < MAX_RESTS && !this.#rests.some(other => isEqual(other, rest))) this.#rests.push(rest)
  }

  /** Goes on to where a byte is read. `at` is as in Rest; 0 at the beginning of a node. */
  expand (node: Node, at: Letter | number, next: Rest | undefined): this {
    switch (node.kind) {
      case 'letters': {
        const letter = typeof at === 'number' ? node.root : at
        if (letter.next.size > 0 || letter.base !== undefined) this.push({ node, at: letter, next })
        return letter.final ? this.#resume(next) : this
      }
      case 'sequence': {
        const index = at as number
        const first = node.nodes[index]
        if (first === undefined) return this.#resume(next)
        return this.expand(first, 0, index + 1 === node.nodes.length ? next : { node, at: index + 1, next })
      }
      case 'choice':
        for (const one of node.nodes) this.expand(one, 0, next)
        return this
      case 'repeat': {
        const count = at as number
        // Where there is no limit only the minimum must be counted.
        const counted = node.max === Infinity ? Math.min(count + 1, node.min) : count + 1
        if (count < node.max) this.expand(node.node, 0, { node, at: counted, next })
        return count >= node.min ? this.#resume(next) : this
      }
      case 'later':
        return this.expand(node.node as Node, 0, next)
      case 'free':
        this.push({ node, at: at as number, next }, true)
        return this
    }
  }

  #resume (rest: Rest | undefined): this {
    if (rest !== undefined) return this.expand(rest.node, rest.at, rest.next)
    this.#end = true
    return this
  }
}

function isEqual (a: Rest | undefined, b: Rest | undefined): boolean {
  while (a !== b) {
    if (a === undefined || b === undefined || a.node !== b.node || a.at !== b.at) return false
    a = a.next
    b = b.next
  }
  return true
}
