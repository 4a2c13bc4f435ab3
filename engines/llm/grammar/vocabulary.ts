import { setImmediate as nextTurn } from 'node:timers/promises'
import type { Tokenizer } from '../text/tokenizer.ts'
import { step, type State } from './automaton.ts'

/** How long is computed in one turn of the event loop, milliseconds, for all sequences together. */
const SLICE_MS = 2
/** Bytes read between two looks at the clock. */
const READS = 256
/** Ways that are followed for one mask, by bytes of the vocabulary: inside a string there are three. */
const MAX_WAYS = 32

interface Token {
  readonly id: number
  readonly bytes: Uint8Array
}

/** Computes a slice with each call of `next`. */
export type MaskWork = Generator<undefined, Uint32Array, undefined>

/** A mask that takes longer than there is time in this turn. */
export interface MaskJob {
  readonly work: MaskWork
  /** Its sequence has ended. */
  isIdle (): boolean
  onDone (mask: Uint32Array | Error): void
}

/** The tokens of a model as automata see them: sorted by their bytes, so that a beginning is read once for all that share it. */
export class Vocabulary {
  readonly #tokens: readonly Token[]
  /** With how many bytes a token begins as the one before it does. */
  readonly #shared: Uint16Array
  readonly #size: number
  readonly #maxWork: number
  readonly #jobs: MaskJob[] = []
  /** Milliseconds of this turn. */
  #spent = 0

  private constructor (tokens: readonly Token[], size: number) {
    this.#tokens = tokens
    this.#size = size
    this.#maxWork = MAX_WAYS * tokens.reduce((sum, { bytes }) => sum + bytes.length, 0)
    this.#shared = Uint16Array.from(tokens, ({ bytes }, i) => commonBytes(tokens[i - 1]?.bytes, bytes))
  }

  /** Without special tokens, which are no text. In slices: a large vocabulary takes a second. */
  static async of (tokenizer: Pick<Tokenizer, 'bytes' | 'isSpecial'>, size: number): Promise<Vocabulary> {
    const byBeginning: Array<Token[] | undefined> = []
    let since = performance.now()
    const pause = async (): Promise<void> => {
      if (performance.now() - since < SLICE_MS) return
      await nextTurn()
      since = performance.now()
    }
    for (let id = 0; id < size; id++) {
      await pause()
      const bytes = tokenizer.isSpecial(id) ? [] : tokenizer.bytes(id)
      if (bytes.length === 0) continue
      // A token of one byte stands before all that begin with it.
      const beginning = (bytes[0] as number) * 257 + (bytes.length > 1 ? (bytes[1] as number) + 1 : 0)
      ;(byBeginning[beginning] ??= []).push({ id, bytes: bytes as Uint8Array })
    }
    const tokens: Token[] = []
    for (const list of byBeginning) {
      if (list === undefined) continue
      await pause()
      for (const token of list.sort((a, b) => Buffer.compare(a.bytes, b.bytes))) tokens.push(token)
    }
    return new Vocabulary(tokens, size)
  }

  /** The mask, if there is time for it in this turn; else a slice is computed in each of the next ones, and `onDone` called. */
  compute (job: MaskJob): Uint32Array | undefined {
    if (this.#jobs.length === 0 && this.#spent < SLICE_MS) {
      const mask = this.#slice(job)
      if (mask !== undefined) return mask
    }
    if (this.#jobs.push(job) === 1) setImmediate(() => { this.#turn() })
    return undefined
  }

  #slice ({ work }: MaskJob): Uint32Array | undefined {
    if (this.#spent === 0) setImmediate(() => { this.#spent = 0 })
    const since = performance.now()
    try {
      const { done, value } = work.next()
      return done === true ? value : undefined
    } finally {
      this.#spent += performance.now() - since
    }
  }

  /** One slice for the oldest job, which then waits behind the others. */
  #turn (): void {
    const job = this.#jobs.shift()
    if (job === undefined) return
    if (!job.isIdle()) {
      let result: Uint32Array | Error | undefined
      try {
        result = this.#slice(job)
      } catch (err) {
        result = err as Error
      }
      if (result === undefined) this.#jobs.push(job)
      else job.onDone(result)
    }
    if (this.#jobs.length > 0) setImmediate(() => { this.#turn() })
  }

  /**
   * The bits of the tokens that may follow.
   * @throws Error when that is too much work
   */
  * maskOf (state: State): MaskWork {
    const mask = new Uint32Array(Math.ceil(this.#size / 32))
    const states: State[] = [state]
    let since = performance.now()
    // How many bytes of the last token could be read.
    let valid = 0
    let [reads, work] = [0, 0]
    for (let i = 0; i < this.#tokens.length; i++) {
      const { id, bytes } = this.#tokens[i] as Token
      const shared = this.#shared[i] as number
      // It begins with what could not be read in the last one.
      if (shared > valid) continue
      for (valid = shared; valid < bytes.length; valid++) {
        const before = states[valid] as State
        reads++
        work += before.rests.length
        const next = step(before, bytes[valid] as number)
        if (next === undefined) break
        states[valid + 1] = next
      }
      if (valid === bytes.length) setBit(mask, id)
      if (work > this.#maxWork) throw new Error('there are too many ways to go on')
      if (reads < READS) continue
      reads = 0
      if (performance.now() - since < SLICE_MS) continue
      yield
      since = performance.now()
    }
    return mask
  }
}

export function setBit (mask: Uint32Array, index: number): void {
  mask[index >>> 5] = (mask[index >>> 5] as number) | 1 << (index & 31)
}

function commonBytes (a: Uint8Array | undefined, b: Uint8Array): number {
  const differs = b.findIndex((byte, i) => byte !== a?.[i])
  return differs === -1 ? b.length : differs
}
