interface Block { readonly bytes: Buffer, readonly words: Int32Array, used: number }

export const NOWHERE = -1

/** Of an entry: [before, bytes, kind, mark], then its content. All begin at a multiple of four bytes. */
const HEAD_WORDS = 4
const HEAD_BYTES = 4 * HEAD_WORDS
/** UTF-8 of a UTF-16 unit, at most. */
const WORST = 3
const MAX_BLOCK_BYTES = 1 << 20
const MIN_BLOCK_BYTES = 1 << 13
/** Positions are 31 bits, so that they are numbers V8 need not allocate: a block's number above, a word's within it below. */
const WORD_BITS = 18
const BLOCK_NUMBERS = 1 << 13

/**
 * Entries one behind the other in blocks of memory outside of the heap, chained by whoever writes them, forgotten from
 * the oldest on. For what is kept by the thousand and read by the dozen: on the heap the garbage collector would copy
 * all of it, over and over, until it leaves.
 */
export class EntryLog {
  readonly #blockBytes: number
  /** From the oldest on. */
  readonly #blocks: Block[] = []
  /** Of the oldest block. */
  #number = 0
  #spare: Block | undefined

  /** @param expected bytes in all: a block is a small part of that */
  constructor (expected: number) {
    this.#blockBytes = Math.max(MIN_BLOCK_BYTES, Math.min(MAX_BLOCK_BYTES, expected >> 4 & ~3))
  }

  /** Bytes of memory it takes, with the block that waits to be used again. */
  get bytes (): number {
    return this.#blocks.length === 0 ? 0 : (this.#blocks.length + 1) * this.#blockBytes
  }

  /** Bytes of the longest content: that of a text may be three times as many as it has UTF-16 units. */
  get longest (): number {
    return this.#blockBytes - HEAD_BYTES
  }

  /** Where the next entry will be, or one behind it. */
  get end (): number {
    return this.#position(Math.max(0, this.#blocks.length - 1), this.#blocks.at(-1)?.used ?? 0)
  }

  /**
   * @param before position of the entry before it in its chain, or NOWHERE
   * @param mark 32 bits to know it by without reading it
   * @returns its position
   */
  appendText (before: number, kind: number, mark: number, text: string, more = ''): number {
    const block = this.#blockFor(WORST * (text.length + more.length))
    const from = block.used + HEAD_BYTES
    let length = block.bytes.write(text, from)
    if (more !== '') length += block.bytes.write(more, from + length)
    return this.#finish(block, before, kind, mark, length)
  }

  appendWords (before: number, kind: number, mark: number, words: Int32Array): number {
    const block = this.#blockFor(words.byteLength)
    block.words.set(words, (block.used + HEAD_BYTES) >> 2)
    return this.#finish(block, before, kind, mark, words.byteLength)
  }

  before (position: number): number { return this.#word(position, 0) }
  kind (position: number): number { return this.#word(position, 2) }
  mark (position: number): number { return this.#word(position, 3) }

  text (position: number): string {
    const from = this.#offset(position) + HEAD_BYTES
    return this.#block(position).bytes.toString('utf8', from, from + this.#word(position, 1))
  }

  /** Valid until the entry is forgotten. */
  words (position: number): Int32Array {
    const from = (this.#offset(position) >> 2) + HEAD_WORDS
    return this.#block(position).words.subarray(from, from + (this.#word(position, 1) >> 2))
  }

  /** Nothing before this position will be read any more. */
  forget (position: number): void {
    for (let count = this.#index(position); count > 0; count--) {
      this.#spare = this.#blocks.shift()
      this.#number++
    }
  }

  #blockFor (bytes: number): Block {
    const last = this.#blocks.at(-1)
    if (last !== undefined && last.used + HEAD_BYTES + bytes <= this.#blockBytes) return last
    const block = this.#fresh()
    this.#blocks.push(block)
    return block
  }

  #finish (block: Block, before: number, kind: number, mark: number, length: number): number {
    const { words, used } = block
    const at = used >> 2
    words[at] = before
    words[at + 1] = length
    words[at + 2] = kind
    words[at + 3] = mark
    block.used = used + HEAD_BYTES + (length + 3 & ~3)
    return this.#position(this.#blocks.length - 1, used)
  }

  #fresh (): Block {
    const block = this.#spare
    this.#spare = undefined
    if (block !== undefined) {
      block.used = 0
      return block
    }
    const bytes = Buffer.allocUnsafeSlow(this.#blockBytes)
    return { bytes, words: new Int32Array(bytes.buffer), used: 0 }
  }

  #word (position: number, n: number): number {
    return this.#block(position).words[(this.#offset(position) >> 2) + n]!
  }

  #block (position: number): Block {
    return this.#blocks[this.#index(position)]!
  }

  #index (position: number): number {
    return ((position >> WORD_BITS) - this.#number) & (BLOCK_NUMBERS - 1)
  }

  #offset (position: number): number {
    return (position & ((1 << WORD_BITS) - 1)) << 2
  }

  #position (index: number, offset: number): number {
    return ((this.#number + index) & (BLOCK_NUMBERS - 1)) << WORD_BITS | offset >> 2
  }
}
