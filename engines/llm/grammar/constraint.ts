import type { Tokenizer } from '../text/tokenizer.ts'
import { begin, keyOf, step, type Node, type State } from './automaton.ts'
import { setBit, type MaskJob, type MaskWork, type Vocabulary } from './vocabulary.ts'

/** Masks kept of one grammar: inside a string, and between the same members, they are the same again and again. */
const MAX_MASKS = 128

export interface GrammarParts {
  readonly vocabulary: Vocabulary
  readonly tokenizer: Pick<Tokenizer, 'bytes'>
  /** What a text ends with. */
  readonly eosIds: readonly number[]
}

/** What the answers of one request may be. */
export class Grammar {
  readonly #node: Node
  readonly #parts: GrammarParts
  readonly #masks = new Map<string, Uint32Array>()

  constructor (node: Node, parts: GrammarParts) {
    this.#node = node
    this.#parts = parts
  }

  /** @param onReady called when a mask is there that was not there at once, or with why there will be none */
  constrain (onReady: (error?: Error) => void): Constraint {
    return new Constraint(begin(this.#node), this, this.#parts.tokenizer, onReady)
  }

  /** The tokens that may follow: at once where they are known or found quickly; else undefined, and `onDone` is called later. */
  mask (state: State, { isIdle, onDone }: Omit<MaskJob, 'work'>): Uint32Array | undefined {
    const key = keyOf(state)
    return this.#masks.get(key) ?? this.#parts.vocabulary.compute({ work: this.#work(key, state), isIdle, onDone })
  }

  * #work (key: string, state: State): MaskWork {
    // Another choice may have asked for it while this one waited.
    const known = this.#masks.get(key)
    if (known !== undefined) return known
    const { vocabulary, eosIds } = this.#parts
    const mask = yield * vocabulary.maskOf(state)
    if (state.end) for (const id of eosIds) setBit(mask, id)
    if (mask.every(bits => bits === 0)) throw new Error('none of the model\'s tokens may come next')
    const [oldest] = this.#masks.keys()
    if (this.#masks.size >= MAX_MASKS && oldest !== undefined) this.#masks.delete(oldest)
    this.#masks.set(key, mask)
    return mask
  }
}

/** Holds one answer to its grammar: a sequence that has one is decoded when the mask of its next token is there. */
export class Constraint {
  readonly #grammar: Grammar
  readonly #tokenizer: GrammarParts['tokenizer']
  readonly #onReady: (error?: Error) => void
  #state: State
  #mask: Uint32Array | undefined

  constructor (state: State, grammar: Grammar, tokenizer: GrammarParts['tokenizer'], onReady: (error?: Error) => void) {
    this.#state = state
    this.#grammar = grammar
    this.#tokenizer = tokenizer
    this.#onReady = onReady
    this.#look()
  }

  /** One bit for each token that may come next; undefined while they are computed. */
  get mask (): Uint32Array | undefined {
    return this.#mask
  }

  /** The text is whole, and nothing may follow. */
  get complete (): boolean {
    return this.#state.end && this.#state.rests.length === 0
  }

  /** Takes a token that is text. @throws Error when it may not follow */
  accept (token: number): void {
    for (const byte of this.#tokenizer.bytes(token)) {
      const next = step(this.#state, byte)
      if (next === undefined) throw new Error('a token that the grammar of the answer has no place for')
      this.#state = next
    }
    this.#mask = undefined
    if (!this.complete) this.#look()
  }

  /** The sequence has ended: masks that are being computed for it are not needed. */
  close (): void {
    this.#state = CLOSED
  }

  #look (): void {
    const state = this.#state
    const isIdle = (): boolean => state !== this.#state
    try {
      this.#mask = this.#grammar.mask(state, { isIdle, onDone: result => { this.#take(result) } })
    } catch (err) {
      // Later: the constraint may not be made yet.
      setImmediate(() => { if (!isIdle()) this.#take(err as Error) })
    }
  }

  #take (result: Uint32Array | Error): void {
    if (result instanceof Error) return this.#onReady(result)
    this.#mask = result
    this.#onReady()
  }
}

const CLOSED: State = { rests: [], end: true }
